"""DICOM is read as a viewer shows it, or refused by name."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import JPEGBaseline8Bit

from famseg.data.phantom import Phantom
from famseg.files.errors import DataError
from famseg.files.images import read_image
from tests.dicom import dicom, region, save

SHAPE = (45, 70)


@pytest.fixture(scope="module")
def grey() -> np.ndarray:
    return Phantom(1, SHAPE, seed=2)[0].image


def test_dicom_pixels_are_those_of_the_frame(tmp_path: Path, grey: np.ndarray) -> None:
    for name, record, expected in (
        ("grey", dicom(grey), grey),
        ("colour", dicom(np.stack([grey] * 3, 2)), grey),
        ("inverted", dicom(255 - grey, PhotometricInterpretation="MONOCHROME1"), grey),
    ):
        image, pixel_size = read_image(save(record, tmp_path / name))  # known without a suffix
        np.testing.assert_array_equal(image, expected)
        assert pixel_size is None
    deep = np.linspace(100, 900, grey.size).reshape(SHAPE).astype(np.uint16)
    image, _ = read_image(save(dicom(deep), tmp_path / "deep"))
    np.testing.assert_allclose(image, (deep - 100.0) / 800 * 255, atol=0.51)


def test_dicom_pixel_sizes(tmp_path: Path, grey: np.ndarray) -> None:
    def size(**attributes: object) -> float | None:
        return read_image(save(dicom(grey, **attributes), tmp_path / "x.dcm"))[1]

    assert size(PixelSpacing=[0.2, 0.2]) == pytest.approx(0.2)
    assert size(SequenceOfUltrasoundRegions=[region(0.03)], PixelSpacing=[9, 9]) == pytest.approx(0.3)
    spectrum = region(0.5, RegionSpatialFormat=3)  # Doppler: its x axis is time
    assert size(SequenceOfUltrasoundRegions=[spectrum, region(0.03)]) == pytest.approx(0.3)
    assert size(SequenceOfUltrasoundRegions=[region(0.03, PhysicalUnitsXDirection=4)]) is None
    with pytest.raises(DataError, match="square pixels"):
        size(PixelSpacing=[0.2, 0.3])
    with pytest.raises(DataError, match="2 pictures of different pixel sizes"):
        size(SequenceOfUltrasoundRegions=[region(0.03), region(0.01)])


def test_dicom_that_cannot_be_used_says_why(tmp_path: Path, grey: np.ndarray) -> None:
    film = dicom(grey)
    film.NumberOfFrames, film.PixelData = 2, grey.tobytes() * 2
    with pytest.raises(DataError, match="one frame, found 2"):
        read_image(save(film, tmp_path / "film.dcm"))
    short = dicom(grey)
    short.PixelData = grey.tobytes()[:101] + b"\0"
    with pytest.raises(DataError, match="cannot be decoded") as caught:
        read_image(save(short, tmp_path / "short.dcm"))
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="cannot be decoded"):
        (tmp_path / "noise.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"\xff" * 50)
        read_image(tmp_path / "noise.dcm")


def test_without_pydicom_the_message_says_what_to_install(
    tmp_path: Path, grey: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(dicom(grey), tmp_path / "x.dcm")
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(DataError, match=r"pip install 'famseg\[dicom\]'"):
        read_image(path)


RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


def shown(folder: Path, pixels: np.ndarray, **attributes: object) -> np.ndarray:
    return read_image(save(dicom(pixels, **attributes), folder / "x.dcm"))[0]


def palette(entries: np.ndarray, bits: int, first: int = 0) -> dict[str, object]:
    found: dict[str, object] = {"PhotometricInterpretation": "PALETTE COLOR"}
    for name in ("Red", "Green", "Blue"):
        found[f"{name}PaletteColorLookupTableDescriptor"] = [len(entries) % 2**16, first, bits]
        found[f"{name}PaletteColorLookupTableData"] = entries.astype("<u2" if bits == 16 else "u1").tobytes()
    return found


def table(entries: np.ndarray, bits: int, first: int = 0) -> Sequence:
    item = Dataset()
    item.LUTDescriptor, item.LUTData = [len(entries) % 2**16, first, bits], entries.astype("<u2").tobytes()
    return Sequence([item])


@pytest.mark.parametrize(
    ("entries", "bits"), [(255 - np.arange(256), 8), (65535 - 257 * np.arange(256), 16), (np.arange(256) // 2, 8)]
)
def test_a_palette_is_looked_up(tmp_path: Path, entries: np.ndarray, bits: int) -> None:
    expected = np.rint(entries * (255 / (2**bits - 1))).reshape(16, 16)
    np.testing.assert_array_equal(shown(tmp_path, RAMP, **palette(entries, bits)), expected)


def test_the_ends_of_a_palette_hold_outside_of_it(tmp_path: Path) -> None:
    deep = RAMP.astype(np.uint16) * 100
    expected = np.clip(deep.astype(int) - 1000, 0, 199)
    np.testing.assert_array_equal(shown(tmp_path, deep, **palette(np.arange(200), 8, first=1000)), expected)


def linear(values: np.ndarray, centre: float, width: float) -> np.ndarray:
    """PS3.3 C.11.2.1.2.1, word for word, to 0..255."""
    low, high = centre - 0.5 - (width - 1) / 2, centre - 0.5 + (width - 1) / 2
    inside = ((values - (centre - 0.5)) / (width - 1) + 0.5) * 255
    return np.rint(np.where(values <= low, 0, np.where(values > high, 255, inside)))


def test_windows_slopes_and_polarity_in_the_standards_order(tmp_path: Path) -> None:
    deep, v = RAMP.astype(np.uint16) * 16, RAMP * 16.0
    window = {"WindowCenter": 1000, "WindowWidth": 800}
    rescale = {"RescaleSlope": 0.5, "RescaleIntercept": -1024}
    signed = (RAMP.astype(np.int16) - 128) * 16
    cases = {
        "8 bit, window": (RAMP, {"WindowCenter": 100, "WindowWidth": 50}, linear(RAMP, 100, 50)),
        "the whole range": (RAMP, {"WindowCenter": 128, "WindowWidth": 256}, RAMP),
        "window": (deep, window, linear(v, 1000, 800)),
        "first of several": (deep, {"WindowCenter": [1000, 7], "WindowWidth": [800, 3]}, linear(v, 1000, 800)),
        "rescale and window": (deep, rescale | {"WindowCenter": 0, "WindowWidth": 600}, linear(v / 2 - 1024, 0, 600)),
        "exact": (deep, window | {"VOILUTFunction": "LINEAR_EXACT"}, np.rint(np.clip((v - 600) / 800, 0, 1) * 255)),
        "sigmoid": (deep, window | {"VOILUTFunction": "SIGMOID"}, np.rint(255 / (1 + np.exp(-(v - 1000) / 200)))),
        "falling slope": (RAMP, {"RescaleSlope": -1, "RescaleIntercept": 255}, 255 - RAMP.astype(int)),
        "slope": (RAMP, {"RescaleSlope": 3, "RescaleIntercept": -7}, RAMP),
        "white is least": (RAMP, {"PhotometricInterpretation": "MONOCHROME1"}, 255 - RAMP.astype(int)),
        "inverse shape": (RAMP, {"PresentationLUTShape": "INVERSE"}, 255 - RAMP.astype(int)),
        "both, as it should be": (
            RAMP,
            {"PresentationLUTShape": "INVERSE", "PhotometricInterpretation": "MONOCHROME1"},
            255 - RAMP.astype(int),
        ),
        "8 bits stored in 16": (RAMP.astype(np.uint16), {"BitsStored": 8, "HighBit": 7}, RAMP),
        "6 bits stored": (RAMP // 4, {"BitsStored": 6, "HighBit": 5}, np.rint(RAMP // 4 * (255 / 63))),
        "overlay in unused bits": (deep | 0x8000, {"BitsStored": 12, "HighBit": 11} | window, linear(v, 1000, 800)),
        "signed": (signed, {"PixelRepresentation": 1, "WindowCenter": 0, "WindowWidth": 500}, linear(signed, 0, 500)),
        "signed 8 bit": ((RAMP.astype(int) - 128).astype(np.int8), {"PixelRepresentation": 1}, RAMP),
        "modality table": (RAMP, {"ModalityLUTSequence": table(255 - np.arange(256), 8)}, 255 - RAMP.astype(int)),
        "table of few entries": (
            deep,
            {"VOILUTSequence": table(np.arange(0, 1000, 10), 10, first=300)},
            np.rint(np.clip(deep.astype(int) - 300, 0, 99) * 10 * (255 / 1023)),
        ),
        "8-bit table over 16-bit pixels": (
            deep,
            {"VOILUTSequence": table(np.arange(256), 8, first=0)},
            np.clip(deep.astype(int), 0, 255),
        ),
    }
    for name, (pixels, attributes, expected) in cases.items():
        np.testing.assert_array_equal(shown(tmp_path, pixels, **attributes), expected, err_msg=name)


def test_padding_is_black_and_no_part_of_the_range(tmp_path: Path) -> None:
    deep = (RAMP.astype(np.int16) + 100).copy()
    deep[0, :4] = -2000
    expected = np.rint((RAMP - 4.0) / 251 * 255)
    expected[0, :4] = 0
    image = shown(tmp_path, deep, PixelRepresentation=1, PixelPaddingValue=-2000)
    np.testing.assert_array_equal(image, expected)


def test_an_enhanced_object_keeps_its_display_in_functional_groups(tmp_path: Path) -> None:
    group, window, measures = Dataset(), Dataset(), Dataset()
    window.WindowCenter, window.WindowWidth, measures.PixelSpacing = 100, 50, [0.3, 0.3]
    group.FrameVOILUTSequence, group.PixelMeasuresSequence = Sequence([window]), Sequence([measures])
    record = dicom(RAMP, SharedFunctionalGroupsSequence=Sequence([group]), NumberOfFrames=1)
    image, pixel_size = read_image(save(record, tmp_path / "x.dcm"))
    np.testing.assert_array_equal(image, linear(RAMP, 100, 50))
    assert pixel_size == pytest.approx(0.3)


def test_colour_comes_as_luma(tmp_path: Path) -> None:
    rgb = np.stack([RAMP, RAMP.T, 255 - RAMP], 2)
    luma = np.rint(rgb @ [0.299, 0.587, 0.114])
    np.testing.assert_allclose(shown(tmp_path, rgb), luma, atol=1)
    planar = dicom(rgb, PlanarConfiguration=1)
    planar.PixelData = rgb.transpose(2, 0, 1).tobytes()
    np.testing.assert_allclose(read_image(save(planar, tmp_path / "planar"))[0], luma, atol=1)
    ybr = np.stack([RAMP, np.full_like(RAMP, 128), np.full_like(RAMP, 128)], 2)
    np.testing.assert_array_equal(shown(tmp_path, ybr, PhotometricInterpretation="YBR_FULL"), RAMP)


@pytest.mark.parametrize(
    ("attributes", "words"),
    [
        ({"PhotometricInterpretation": "YBR_PARTIAL_420"}, "found YBR_PARTIAL_420"),
        ({"PhotometricInterpretation": "CMYK"}, "found CMYK"),
        ({"HighBit": 5}, "High Bit 7, found 5"),
        ({"WindowCenter": 100, "WindowWidth": 0}, "window of positive width"),
        ({"WindowCenter": 100, "WindowWidth": -3}, "window of positive width"),
        ({"WindowCenter": 1, "WindowWidth": 2, "VOILUTFunction": "CUBIC"}, "CUBIC"),
        ({"RescaleSlope": 0, "RescaleIntercept": 1}, "slope other than 0"),
        ({"PixelAspectRatio": [1, 2]}, "square pixels"),
        ({"RedPaletteColorLookupTableDescriptor": [256, 0, 8]}, "supplemental palette"),
        ({"ShutterShape": "CIRCULAR"}, "shutter"),
        ({"PresentationLUTShape": "LIN OD"}, "presentation"),
        ({"SamplesPerPixel": 3, "PlanarConfiguration": 0}, "1 sample"),
        ({"PhotometricInterpretation": "RGB"}, "3 sample"),
        ({"PixelAspectRatio": 1}, "two numbers"),
        ({"PixelSpacing": [0.2]}, "two numbers"),
        ({"PixelSpacing": [0.2, 0.2, 0.2]}, "two numbers"),
        ({"PixelSpacing": [0, 0]}, "positive pixel size"),
        ({"PixelSpacing": [-0.2, -0.2]}, "positive pixel size"),
        ({"SequenceOfUltrasoundRegions": [region(0.0)]}, "positive pixel size"),
        ({"SequenceOfUltrasoundRegions": [region(float("nan"))]}, "two numbers"),
        ({"Rows": 65535, "Columns": 65535}, "million pixels"),
    ],
)
def test_what_is_not_displayed_rightly_is_refused_by_name(tmp_path: Path, attributes: dict, words: str) -> None:
    path = save(dicom(RAMP, **attributes), tmp_path / "x.dcm")
    with pytest.raises(DataError, match=words) as error:
        read_image(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_spacing_is_compared_with_a_tolerance_and_its_absence_is_told(tmp_path: Path) -> None:
    def size(*regions: Dataset) -> float | None:
        return read_image(save(dicom(RAMP, SequenceOfUltrasoundRegions=list(regions)), tmp_path / "x.dcm"))[1]

    assert size(region(0.03), region(0.03 + 1e-8)) == pytest.approx(0.3)
    assert size(region(0.03, PhysicalDeltaY=-0.0300001)) == pytest.approx(0.3, rel=1e-5)
    nothing = region(0.03)
    del nothing.PhysicalDeltaY
    with pytest.raises(DataError, match=r"x\.dcm: Physical Delta X and Y: expected two numbers"):
        size(nothing)
    path = save(dicom(RAMP, PixelSpacing=[0.25, 0.25]), tmp_path / "commas.dcm")
    path.write_bytes(path.read_bytes().replace(b"0.25\\0.25", b"0,25\\0,25"))
    with pytest.raises(DataError, match=r"commas\.dcm") as error:
        read_image(path)
    assert "\n" not in str(error.value)


def test_floating_point_pixels_are_refused(tmp_path: Path) -> None:
    record = dicom(RAMP)
    del record.PixelData
    record.FloatPixelData = RAMP.astype(np.float32).tobytes()
    with pytest.raises(DataError, match="floating-point"):
        read_image(save(record, tmp_path / "x.dcm"))


def test_a_damaged_jpeg_in_dicom_is_refused(tmp_path: Path, grey: np.ndarray) -> None:
    stream = io.BytesIO()
    Image.fromarray(grey).save(stream, "JPEG", quality=95)
    whole = stream.getvalue()
    middle = len(whole) // 2
    for name, content in {"whole": whole, "damaged": whole[:middle] + bytes(64) + whole[middle + 64 :]}.items():
        record = dicom(grey)
        record.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
        record.PixelData = encapsulate([content])
        save(record, tmp_path / name)
    np.testing.assert_allclose(read_image(tmp_path / "whole")[0].astype(int), grey, atol=12)
    with pytest.raises(DataError, match="damaged: cannot be decoded whole"):
        read_image(tmp_path / "damaged")
