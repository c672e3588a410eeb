"""Draw docs/figures/phantom.png: phantoms, and real HC18 images below them for comparison.

python docs/figures/phantom_contact_sheet.py [HC18_FOLDER]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import cv2
import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from famseg.anatomy import OBJECTS  # noqa: E402
from famseg.data.phantom import Phantom  # noqa: E402
from famseg.data.sample import Sample  # noqa: E402

TILE = 256
COLUMNS = 4
REAL = ("201_HC", "003_HC", "104_HC", "302_HC")


def draw_sample(sample: Sample, outlined: bool) -> np.ndarray:
    tile = cv2.cvtColor(sample.image, cv2.COLOR_GRAY2BGR)
    for structure in OBJECTS if outlined else ():
        mask = (sample.mask == structure.label).astype(np.uint8)
        contours, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(tile, contours, -1, structure.shade[::-1], 1)
    return tile


def load_real(path: Path) -> np.ndarray:
    """The largest central square, so that real and synthetic tiles are equally undistorted."""
    image = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if image is None:
        raise FileNotFoundError(path)
    h, w = image.shape[:2]
    side = min(h, w)
    top, left = (h - side) // 2, (w - side) // 2
    square = image[top : top + side, left : left + side]
    return cv2.resize(square, (TILE, TILE), interpolation=cv2.INTER_AREA)


def arrange(tiles: list[np.ndarray]) -> np.ndarray:
    return np.vstack([np.hstack(tiles[i : i + COLUMNS]) for i in range(0, len(tiles), COLUMNS)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("hc18", nargs="?", type=Path, help="HC18 folder that holds training_set/")
    parser.add_argument("--out", type=Path, default=HERE / "phantom.png")
    arguments = parser.parse_args()
    data = Phantom(12, (TILE, TILE), seed=0)
    sheet = arrange([draw_sample(data[i], outlined=i % 2 == 1) for i in range(len(data))])
    if arguments.hc18 is not None:
        real = arrange([load_real(arguments.hc18 / "training_set" / f"{name}.png") for name in REAL])
        gap = np.full((8, sheet.shape[1], 3), 255, np.uint8)
        sheet = np.vstack([sheet, gap, real])
    cv2.imwrite(str(arguments.out), sheet, [cv2.IMWRITE_PNG_COMPRESSION, 9])


if __name__ == "__main__":
    main()
