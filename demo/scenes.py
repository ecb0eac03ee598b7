"""What the demo model knows: one plain shape on a plain background, as a caption and as a picture of any size."""

import random
from dataclasses import dataclass, replace

import torch
from PIL import Image

SHAPES = ("circle", "square", "triangle", "ring")
COLOURS = {  # sRGB
    "red": (205, 25, 35),
    "orange": (255, 125, 10),
    "yellow": (255, 230, 60),
    "green": (35, 150, 60),
    "blue": (30, 85, 220),
    "purple": (140, 45, 165),
    "black": (20, 20, 20),
    "white": (248, 248, 248),
}
SIZES = {"small": 0.155, "medium": 0.2, "large": 0.26}  # half the shape's width, as a share of the shorter side
POSITIONS = {  # the shape's centre, in widths and heights
    "middle": (0.5, 0.5),
    "left": (0.32, 0.5),
    "right": (0.68, 0.5),
    "top": (0.5, 0.32),
    "bottom": (0.5, 0.68),
}
HELD_OUT_EVERY = 8  # one of so many combinations of shape, colour, background and position is not trained on

PLACES = {
    "middle": ("", "", "in the middle", "in the center"),
    "left": ("on the left",),
    "right": ("on the right",),
    "top": ("at the top",),
    "bottom": ("at the bottom",),
}
SIZE_WORDS = {"small": ("small", "little"), "medium": ("", "", "medium"), "large": ("large", "big")}
OPENINGS = ("a", "a", "a", "A", "a picture of a", "a photo of a", "a drawing of a", "one")
ENDINGS = ("", "", "", ".", ", simple", ", flat colors", ", high quality", " TOK", ", in the style of TOK")


@dataclass(frozen=True)
class Scene:
    """What one picture shows. `dx`, `dy` (picture sides), `grow` and the shades vary it; the caption stays the same."""

    shape: str
    colour: str
    background: str
    size: str
    position: str
    dx: float = 0.0
    dy: float = 0.0
    grow: float = 1.0
    shade: float = 0.0  # from 0, the colour itself, to 1, white, or to -1, black
    ground_shade: float = 0.0


def all_scenes() -> list[Scene]:
    return [
        Scene(shape, colour, background, size, position)
        for shape in SHAPES
        for colour in COLOURS
        for background in COLOURS
        if colour != background
        for size in SIZES
        for position in POSITIONS
    ]


def is_held_out(scene: Scene) -> bool:
    """Whether a scene is in the eighth that is held out, in which every value of an attribute is equally frequent."""
    values = (
        SHAPES.index(scene.shape),
        list(COLOURS).index(scene.colour),
        list(COLOURS).index(scene.background),
        list(POSITIONS).index(scene.position),
    )
    shape, colour, background, position = values
    return (shape + 3 * colour + 5 * background + 2 * position) % HELD_OUT_EVERY == 0


TRAINED = [scene for scene in all_scenes() if not is_held_out(scene)]
HELD_OUT = [scene for scene in all_scenes() if is_held_out(scene)]


def shaded(scene: Scene, rng: random.Random) -> Scene:
    """The same scene in slightly different shades, which a seed decides."""
    return replace(scene, shade=rng.uniform(-0.08, 0.08), ground_shade=rng.uniform(-0.05, 0.05))


def moved(scene: Scene, rng: random.Random, by: float) -> Scene:
    """The same scene elsewhere, by up to `by` picture sides each way, and larger or smaller by up to twice that."""
    dx, dy = rng.uniform(-by, by), rng.uniform(-by, by)
    return replace(scene, dx=dx, dy=dy, grow=rng.uniform(1 - 2 * by, 1 + 2 * by))


def caption(scene: Scene, rng: random.Random | None = None) -> str:
    """The scene in words: the plainest sentence, or with `rng` one of many that mean the same."""
    if rng is None:
        words = [
            "a",
            scene.size if scene.size != "medium" else "",
            scene.colour,
            scene.shape,
            PLACES[scene.position][0],
        ]
        return _article(" ".join(word for word in [*words, f"on a {scene.background} background"] if word))
    size, place = rng.choice(SIZE_WORDS[scene.size]), rng.choice(PLACES[scene.position])
    subject = " ".join(word for word in (rng.choice(OPENINGS), size, scene.colour, scene.shape) if word)
    ground = rng.choice(("on a {} background", "on a {} background", "on {}", "{} background")).format(scene.background)
    comma = "," if ground.endswith("background") and not ground.startswith("on") else ""
    if place and not comma and rng.random() < 0.25:
        sentence = f"{subject} {ground} {place}"
    else:
        sentence = " ".join(word for word in (subject, place) if word) + f"{comma} {ground}"
    return _article(sentence + rng.choice(ENDINGS))


def _article(sentence: str) -> str:
    return sentence.replace("a orange", "an orange").replace("A orange", "An orange")


def draw(scene: Scene, width: int, height: int) -> torch.Tensor:
    """The picture, float32 [3, height, width] in -1..1, with edges smoothed over one pixel."""
    return blend(coverage(scene, width, height), *colours(scene))


def picture_of(scene: Scene, width: int, height: int) -> Image.Image:
    """The picture as an RGB image."""
    return Image.fromarray(((draw(scene, width, height) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())


def blend(cover: torch.Tensor, front: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
    """`front` where `cover` [height, width] is 1, `back` where it is 0; colours are [3] or [3, height, width]."""
    front, back = (c[:, None, None] if c.ndim == 1 else c for c in (front, back))
    return back + cover * (front - back)


def colour(name: str) -> torch.Tensor:
    """A named colour, [3] in -1..1."""
    return torch.tensor(COLOURS[name], dtype=torch.float32) / 127.5 - 1


def colours(scene: Scene) -> tuple[torch.Tensor, torch.Tensor]:
    """The shape's colour and the background's, with their shades, [3] in -1..1 each."""

    def shaded_colour(name: str, shade: float) -> torch.Tensor:
        return torch.lerp(colour(name), torch.full([3], 1.0 if shade > 0 else -1.0), abs(shade))

    return shaded_colour(scene.colour, scene.shade), shaded_colour(scene.background, scene.ground_shade)


def coverage(scene: Scene, width: int, height: int) -> torch.Tensor:
    """How much of each pixel the shape covers, float32 [height, width] in 0..1."""
    side = min(width, height)
    centre_x, centre_y = POSITIONS[scene.position]
    x = (torch.arange(width) + 0.5) / side - centre_x * width / side - scene.dx
    y = (torch.arange(height) + 0.5) / side - centre_y * height / side - scene.dy
    distance = signed_distance(scene.shape, x[None, :], y[:, None], SIZES[scene.size] * scene.grow)
    return (0.5 - distance * side).clamp(0, 1)


def signed_distance(shape: str, x: torch.Tensor, y: torch.Tensor, half: float) -> torch.Tensor:
    """Distance from the outline of a shape about as large as a circle of radius `half`, negative inside."""
    radius = torch.hypot(x, y)
    if shape == "circle":
        return radius - half
    if shape == "ring":
        return (radius - 0.72 * half).abs() - 0.28 * half
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.9 * half
    # a triangle that stands on one side, with its centre of mass at the origin
    slope = (3**0.5 * x.abs() - y) / 2
    return torch.maximum(slope, y) - 0.6 * half
