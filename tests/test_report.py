"""The report is one page that needs nothing else, says what it must, and shows something in a browser."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest

from famseg.biometrics import fit_femur, fit_head
from famseg.data.phantom import Phantom
from famseg.evaluation import evaluate
from famseg.reporting.figures import agreement_figure, overlap_figure, svg
from famseg.reporting.overlay import draw_overlay
from famseg.reporting.page import Picture, report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
VOID = {"meta", "img", "br", "link"}


class Page(HTMLParser):
    """Collects what a page asks for, and whether its elements close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attributes if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def page(lost: int = 1) -> str:
    """A report on six phantoms, shifted by a few pixels, the first `lost` of them not found at all."""
    samples = [Phantom(6, (96, 96), seed=1)[i] for i in range(6)]
    labels = [np.zeros_like(s.mask) if i < lost else np.roll(s.mask, 3, axis=1) for i, s in enumerate(samples)]
    evaluation = evaluate(samples, labels)
    pictures = []
    for s, found in zip(samples, labels, strict=True):
        shapes = {"FB": fit_head(found == 2), "FL": fit_femur(found == 1)}
        overlay = draw_overlay(s.image, found, shapes, truth=s.mask)
        pictures.append(Picture(f"<{s.name}>", s.image, overlay, ["a & b"], ["cut off"]))
    return report(
        title="Ruler & <tape>",
        subtitle="six images",
        facts="facts",
        notes=["A note."],
        summary=evaluation.summary(),
        rows=[image.row() for image in evaluation.images],
        pictures={"All": pictures, "None": []},
        history=[{"epoch": 1, "phase": "adamw", "train_loss": 1.0, "val_miou": 0.5}],
        version="0",
    )


def test_the_page_is_whole_and_asks_for_nothing() -> None:
    text = page()
    parsed = Page(text)
    assert parsed.open == []
    assert len(parsed.sources) == 4 + 2 * 6  # two agreement plots, overlap, history; two pictures an image
    assert all(source.startswith("data:image/") for source in parsed.sources)
    assert "<script" not in text
    assert not re.search(r"url\(|@import", text)


def test_the_page_says_what_it_must_and_escapes_what_it_is_given() -> None:
    text = page()
    words = " ".join(Page(text).words)
    for phrase in ("Ruler & <tape>", "six images", "A note.", "1 missed", "0 mm", "a & b", "cut off", "Training"):
        assert phrase in words.replace("\xa0", " "), phrase
    assert "<tape>" not in text
    assert "nan" not in words.lower()
    assert "None" not in words


def test_a_network_that_finds_nothing_has_a_report() -> None:
    words = " ".join(Page(page(lost=6)).words)
    assert "none measured" in words


def test_figures_are_reproducible_and_refuse_nothing_to_show() -> None:
    first, second = (svg(agreement_figure("Head", "FB", [100.0, 90.0], [101.0, 88.0])) for _ in range(2))
    assert first == second
    assert b"bias" in first
    assert b"\xe2\x88\x92" in first or b"-" in first
    svg(agreement_figure("Head", "FB", [100.0], [100.0]))
    with pytest.raises(ValueError, match="pairs"):
        agreement_figure("Head", "FB", [], [])
    with pytest.raises(ValueError, match="at least one class"):
        overlap_figure({"FB": []})


def test_an_overlay_shows_objects_truth_and_calipers_where_they_are() -> None:
    image, labels, truth = (np.zeros((100, 120), np.uint8) for _ in range(3))
    labels[30:70, 30:90] = 2
    truth[10:20, 10:110] = 1
    picture = draw_overlay(image, labels, {"FB": fit_head(labels == 2)}, truth=truth, caption=["HC 10.0 mm"])
    scale = picture.shape[1] // 120
    assert picture.shape[0] > 100 * scale  # the caption's strip
    red, green, blue = (picture[..., c].astype(int) for c in range(3))
    inside = np.s_[45 * scale : 55 * scale, 45 * scale : 75 * scale]
    assert (green[inside] > red[inside]).all()
    white = (red > 150) & (green > 150) & (blue > 150)
    assert white[8 * scale : 22 * scale].any()
    assert not white[22 * scale : 100 * scale].any()
    yellow = (red > 150) & (green > 150) & (blue < 120)
    assert yellow[: 100 * scale].any()


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium to look at the page")
@pytest.mark.parametrize("width", [1200, 480])
def test_a_browser_shows_the_page(tmp_path: Path, width: int) -> None:
    (tmp_path / "report.html").write_text(page(), encoding="utf-8")
    shot = tmp_path / "shot.png"
    subprocess.run(
        [
            str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},2400", f"--screenshot={shot}",
            (tmp_path / "report.html").as_uri(),
        ],
        check=True,
        capture_output=True,
        timeout=180,
    )  # fmt: skip
    picture = cv2.imread(str(shot)).astype(int)
    blue, green, red = (picture[..., c] for c in range(3))
    assert picture.shape[1] == width
    assert ((green - red > 60) & (green - blue > 60)).sum() > 500  # heads
    assert ((red - green > 60) & (red - blue > 60)).sum() > 200  # femurs
    assert (picture.max(2) < 20).sum() > 0.02 * picture[..., 0].size  # ultrasound is dark
