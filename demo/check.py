"""Does a picture show what its caption says? Colours by pixel, shape by overlap, position by centre of mass."""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from demo.scenes import COLOURS, POSITIONS, SHAPES, SIZES, Scene, coverage

BORDER = 0.012  # of the shorter side: no shape comes so close to the edge, so the border shows the background
SAME_COLOUR = 60.0  # largest distance in sRGB at which a pixel counts as a colour; named ones are over 110 apart
MIN_AREA = 0.004  # of the shorter side squared; less does not count as a shape
MIN_OVERLAP = 0.75  # intersection over union with the best template
MAX_OFFSET = 0.1  # of the shorter side, between the centre of mass and where it should be


@dataclass(frozen=True)
class Verdict:
    """Which attributes are right."""

    background: bool
    colour: bool
    position: bool
    shape: bool
    size: bool

    @property
    def everything(self) -> bool:
        return self.background and self.colour and self.position and self.shape and self.size


NOTHING = Verdict(background=False, colour=False, position=False, shape=False, size=False)


def check(picture: Image.Image, scene: Scene) -> Verdict:
    """Compare an RGB picture of any size with what it should show."""
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float32)
    ground = np.median(_border(pixels), axis=0)
    background_right = _name(ground) == scene.background and _share(_border(pixels), ground) > 0.97
    front = np.linalg.norm(pixels - ground, axis=2) > SAME_COLOUR
    height, width = front.shape
    side = min(width, height)
    if front.sum() < MIN_AREA * side**2:
        return Verdict(**{**vars(NOTHING), "background": background_right})
    paint = np.median(pixels[front], axis=0)
    centre = np.argwhere(front).mean(axis=0)[::-1] + 0.5  # x, y
    shape, overlap = _best_template(front, scene.size)
    return Verdict(
        background=background_right,
        colour=_name(paint) == scene.colour and _share(pixels[front], paint) > 0.85,
        position=bool(np.linalg.norm(centre - _middle(scene.position, width, height)) < MAX_OFFSET * side),
        shape=shape == scene.shape and overlap > MIN_OVERLAP,
        size=_nearest_size(float(front.sum()) / side**2, shape) == scene.size,
    )


def _border(pixels: np.ndarray) -> np.ndarray:
    """[n, 3]: the pixels along the four edges."""
    depth = max(1, round(BORDER * min(pixels.shape[:2])))
    edges = [pixels[:depth], pixels[-depth:], pixels[:, :depth], pixels[:, -depth:]]
    return np.concatenate([edge.reshape(-1, 3) for edge in edges])


def _name(rgb: np.ndarray) -> str | None:
    """The named colour that this is, if it is one."""
    distances = {name: float(np.linalg.norm(rgb - np.array(value))) for name, value in COLOURS.items()}
    nearest = min(distances, key=distances.__getitem__)
    return nearest if distances[nearest] < SAME_COLOUR else None


def _share(pixels: np.ndarray, rgb: np.ndarray) -> float:
    return float((np.linalg.norm(pixels - rgb, axis=-1) < SAME_COLOUR).mean())


def _middle(position: str, width: int, height: int) -> np.ndarray:
    x, y = POSITIONS[position]
    return np.array([x * width, y * height])


def _best_template(front: np.ndarray, size: str) -> tuple[str, float]:
    """The shape that overlaps best with `front` when it has the same centre of mass and area, and the overlap.

    It is not compared at the place that the caption names, because place and size have checks of their own.
    """
    height, width = front.shape
    side = min(width, height)
    y, x = np.argwhere(front).mean(axis=0) + 0.5
    overlaps = {}
    for shape in SHAPES:
        grow = float(np.sqrt(front.sum() / side**2 / _area(shape, size)))
        scene = Scene(
            shape, "red", "white", size, "middle", x / side - width / side / 2, y / side - height / side / 2, grow
        )
        template = coverage(scene, width, height).numpy() > 0.5
        overlaps[shape] = float((front & template).sum() / (front | template).sum())
    best = max(overlaps, key=overlaps.__getitem__)
    return best, overlaps[best]


def _area(shape: str, size: str) -> float:
    """The area of a shape, as a share of the shorter side squared."""
    cover: torch.Tensor = coverage(Scene(shape, "red", "white", size, "middle"), 256, 256)
    return float(cover.mean())


def _nearest_size(area: float, shape: str) -> str:
    return min(SIZES, key=lambda size: abs(float(np.log(area / _area(shape, size)))))
