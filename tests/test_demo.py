"""The demo model draws what it is told. The program that checks its pictures is itself tested on drawn scenes."""

import random
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from demo.check import check
from demo.scenes import (
    COLOURS,
    HELD_OUT,
    POSITIONS,
    SHAPES,
    SIZES,
    TRAINED,
    Scene,
    all_scenes,
    caption,
    coverage,
    moved,
    picture_of,
    shaded,
)
from demo.transformer import new_transformer
from flux.pristine import Pristine
from lora.formats import read_lora
from published import WEIGHTS
from tests.conftest import Server, data_url, raw_data_url
from tools.server import cog_server

DEV = WEIGHTS / "demo-dev" / "transformer"
RED_CIRCLE = Scene("circle", "red", "white", "medium", "middle")
SMALL = {"aspect_ratio": "custom", "width": 256, "height": 256, "output_format": "png"}
FEW = 14  # steps, where it is not shown that the usual 28 are right


def one_wrong(scene: Scene, rng: random.Random) -> dict[str, Scene]:
    """The scene with each attribute in turn replaced by another of its values."""
    values = {"shape": SHAPES, "size": SIZES, "position": POSITIONS}
    wrong = {
        name: replace(scene, **{name: rng.choice([v for v in choices if v != getattr(scene, name)])})
        for name, choices in values.items()
    }
    others = [name for name in COLOURS if name not in (scene.colour, scene.background)]
    return wrong | {name: replace(scene, **{name: rng.choice(others)}) for name in ("colour", "background")}


@pytest.mark.parametrize("size", [(256, 256), (384, 256), (256, 448)])
def test_the_check_passes_drawn_scenes_and_names_what_is_wrong(size: tuple[int, int]) -> None:
    rng = random.Random(str(size))
    for scene in rng.sample(all_scenes(), 25):
        drawn = picture_of(moved(shaded(scene, rng), rng, 0.03), *size)
        assert check(drawn, scene).everything, scene
        for attribute, other in one_wrong(scene, rng).items():
            verdict = check(drawn, other)
            assert not getattr(verdict, attribute), (scene, other)
            assert sum(vars(verdict).values()) == 4, (scene, other, verdict)


def test_the_check_fails_noise_and_nothing() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8))
    verdict = check(noise, RED_CIRCLE)
    assert [verdict.background, verdict.colour, verdict.shape] == [False] * 3
    empty = vars(check(Image.new("RGB", (256, 256), "white"), RED_CIRCLE))
    assert [name for name, right in empty.items() if right] == ["background"]


def test_held_out_scenes_were_not_trained_on_and_have_every_value() -> None:
    assert not set(HELD_OUT) & set(TRAINED)
    for name, values in {"shape": SHAPES, "colour": COLOURS, "size": SIZES, "position": POSITIONS}.items():
        assert {getattr(scene, name) for scene in HELD_OUT} == set(values)


def test_a_caption_says_everything() -> None:
    assert caption(RED_CIRCLE) == "a red circle on a white background"
    assert len({caption(scene) for scene in all_scenes()}) == len(all_scenes())


def colour_inside(picture: Image.Image, scene: Scene) -> str:
    """The named colour that is nearest to the median of the pixels where the shape should be."""
    inside = coverage(scene, *picture.size).numpy() > 0.5
    median = np.median(np.asarray(picture.convert("RGB"), np.float32)[inside], axis=0)
    return min(COLOURS, key=lambda name: float(np.linalg.norm(median - np.array(COLOURS[name]))))


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server that a newcomer starts, without naming weights."""
    with cog_server({"LORA_CACHE_DIR": str(tmp_path_factory.mktemp("loras"))}) as running:
        yield Server(running.url)


@pytest.mark.parametrize("model", ["dev", "schnell"])
def test_it_draws_what_it_is_told(demo: Server, model: str) -> None:
    steps = {"dev": 28, "schnell": 4}[model]
    for scene in (RED_CIRCLE, Scene("square", "blue", "yellow", "large", "left")):
        picture = demo.pictures(
            prompt=caption(scene), model=model, num_inference_steps=steps, megapixels="0.25", seed=1
        )[0]
        assert check(picture, scene).everything, (caption(scene), check(picture, scene))


def test_go_fast_and_other_seeds_draw_the_same_scene(demo: Server) -> None:
    scene = Scene("triangle", "green", "white", "large", "middle")
    inputs = {"prompt": caption(scene), "megapixels": "0.25", "output_format": "png", "num_inference_steps": FEW}
    for changed in ({"go_fast": True, "seed": 1}, {"seed": 2}):
        picture = demo.pictures(**inputs, **changed)[0]
        assert check(picture, scene).everything, (changed, check(picture, scene))


def test_guidance_makes_it_stricter(demo: Server) -> None:
    scenes = (
        RED_CIRCLE,
        Scene("ring", "black", "orange", "small", "left"),
        Scene("triangle", "yellow", "blue", "large", "top"),
    )

    def right(guidance: float) -> list[bool]:
        inputs = {**SMALL, "num_inference_steps": FEW, "seed": 1, "guidance_scale": guidance}
        return [check(demo.pictures(prompt=caption(scene), **inputs)[0], scene).everything for scene in scenes]

    assert all(right(3))
    assert sum(right(0)) <= 1, "one may come out right by chance"


def test_a_mask_repaints_and_an_image_guides(demo: Server) -> None:
    given = picture_of(RED_CIRCLE, 256, 256)
    asked = replace(RED_CIRCLE, colour="blue")
    mask = Image.new("L", (256, 256), 0)
    mask.paste(255, (64, 64, 192, 192))
    inputs = {"prompt": caption(asked), "image": data_url(given), "seed": 1, "output_format": "png"}
    repainted = demo.pictures(**inputs, mask=data_url(mask), prompt_strength=0.95)[0]
    assert colour_inside(repainted, asked) == "blue"
    kept = np.asarray(mask) == 0
    assert (np.asarray(repainted)[kept] == np.asarray(given)[kept]).all()
    guided = check(demo.pictures(**inputs, prompt_strength=0.3)[0], RED_CIRCLE)
    assert (guided.background, guided.position) == (True, True)


def lora(name: str) -> str:
    content = (WEIGHTS / "demo-loras" / f"{name}.safetensors").read_bytes()
    return raw_data_url(content, "application/octet-stream")


def bottom(picture: Image.Image) -> np.ndarray:
    """The mean colour of the lowest eighth, RGB."""
    pixels = np.asarray(picture.convert("RGB"), np.float32)
    return pixels[-len(pixels) // 8 :].mean(axis=(0, 1))


def test_the_style_comes_with_its_word_and_grows_with_its_strength(demo: Server) -> None:
    scene = Scene("circle", "blue", "white", "medium", "middle")
    inputs = {**SMALL, "num_inference_steps": FEW, "seed": 1, "replicate_weights": lora("sunset")}
    blues = [
        bottom(demo.pictures(**inputs, prompt=caption(scene) + word, lora_scale=scale)[0])[2]
        for word, scale in ((" TOK", 0), (" TOK", 0.5), (" TOK", 1), ("", 1))
    ]
    assert blues[0] > blues[1] + 5 > blues[2] + 40, "white turns to orange"
    assert abs(blues[3] - blues[0]) < 25, "not without the word"


def test_two_loras_combine(demo: Server) -> None:
    scene = Scene("circle", "blue", "white", "large", "middle")
    inputs = {"width": 384, "height": 384, "aspect_ratio": "custom", "seed": 1, "prompt": caption(scene) + " TOK"}
    both = {"replicate_weights": lora("sunset"), "extra_lora": lora("pastel-kohya")}
    plain, changed = demo.pictures(**inputs)[0], demo.pictures(**inputs, **both)[0]
    assert bottom(plain)[2] - bottom(changed)[2] > 60  # the background turned warm
    middle = [np.asarray(picture.convert("RGB"))[192, 192].astype(int) for picture in (plain, changed)]
    assert (middle[1] - middle[0])[:2].min() > 40  # the blue circle became lighter


@pytest.mark.parametrize("name", ["sunset", "pastel"])
def test_both_layouts_of_a_demo_lora_do_the_same(name: str) -> None:
    shapes = {"transformer": Pristine.of(DEV, new_transformer(guidance=True)).shapes}
    ours, kohya = (
        read_lora(WEIGHTS / "demo-loras" / f"{file}.safetensors", shapes, file).updates["transformer"]
        for file in (name, f"{name}-kohya")
    )
    assert ours.keys() == kohya.keys()
    for parameter in ours:
        first, second = (updates[parameter].difference(lambda _: torch.empty(0)) for updates in (ours, kohya))
        torch.testing.assert_close(first, second)


def test_it_says_that_it_is_the_demo_model(demo: Server) -> None:
    logs = demo(prompt="a cat", megapixels="0.25", num_inference_steps=1, model="schnell")["logs"]
    assert "schnell is the demo model: it draws one plain shape" in logs
