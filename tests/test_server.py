"""What a user does over HTTP, through Cog's real server: predict.py with tiny random checkpoints."""

import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
from PIL import Image

from flux.device import compute_dtype
from images import MOST_INPUT_PIXELS
from predict import Predictor
from settings import SettingsError
from tests.conftest import Server, data_url, decode_picture, failure, raw_data_url, same
from tests.oracle import diffusers_picture, load_oracle, small_picture
from tools.server import ServerError, cog_server, wait_until_idle

PRECISION = "bf16" if compute_dtype(torch.device("cpu")) == torch.bfloat16 else "fp32"
METRICS = {
    "seed": int,
    "mode": str,
    "precision": str,
    "width": int,
    "height": int,
    "load_time": float,
    "lora_fetch_time": float,
    "lora_read_time": float,
    "lora_apply_time": float,
    "lora_cache": str,
    "lora_trigger_words": str,
    "encode_time": float,
    "denoise_time": float,
    "decode_time": float,
    "safety_time": float,
    "save_time": float,
    "images_blocked": int,
    "predict_time": float,
}


@pytest.fixture(scope="module")
def oracle(checkpoints: dict[str, Path]) -> dict[str, Any]:
    return load_oracle(checkpoints)


@pytest.mark.parametrize("model", ["dev", "schnell"])
def test_text_to_image_is_the_picture_of_diffusers(
    server: Server, oracle: dict[str, Any], small: dict[str, Any], model: str
) -> None:
    expected = small_picture(oracle[model], model, small)
    assert same(server.pictures(**small, model=model)[0], expected)


def test_image_to_image_is_the_picture_of_diffusers(
    server: Server, oracle: dict[str, Any], small: dict[str, Any], photo: Image.Image
) -> None:
    """240 x 300 becomes 240 x 304, the nearest multiples of 16; the custom size is ignored."""
    drawn = server.pictures(**small, image=data_url(photo), prompt_strength=0.7)[0]
    expected = diffusers_picture(
        oracle["dev"],
        model="dev",
        seed=5,
        prompt=small["prompt"],
        image=photo,
        strength=0.7,
        width=240,
        height=304,
        num_inference_steps=3,
        guidance_scale=3.0,
    )
    assert same(drawn, expected)


def test_inpainting_is_the_picture_of_diffusers_with_the_kept_pixels_exact(
    server: Server, oracle: dict[str, Any], small: dict[str, Any], photo: Image.Image
) -> None:
    """The mask comes in another size than the picture."""
    mask = Image.new("L", (100, 50), 0)
    mask.paste(200, (50, 0, 100, 50))
    drawn = server.pictures(**small, image=data_url(photo), mask=data_url(mask), prompt_strength=0.9)[0]
    expected = diffusers_picture(
        oracle["dev"],
        model="dev",
        seed=5,
        prompt=small["prompt"],
        image=photo,
        mask=mask,
        strength=0.9,
        width=240,
        height=304,
        num_inference_steps=3,
        guidance_scale=3.0,
    )
    original = photo.resize((240, 304), Image.Resampling.LANCZOS)
    assert same(drawn.crop((0, 0, 118, 304)), original.crop((0, 0, 118, 304)))
    assert same(drawn.crop((122, 0, 240, 304)), expected.crop((122, 0, 240, 304)))
    assert not same(drawn.crop((122, 0, 240, 304)), original.crop((122, 0, 240, 304)))


def test_strength_0_returns_the_input_without_a_step(server: Server, small: dict[str, Any], photo: Image.Image) -> None:
    answer = server(**small, image=data_url(photo), prompt_strength=0, num_outputs=2)
    for url in answer["output"]:
        assert same(decode_picture(url), photo.resize((240, 304), Image.Resampling.LANCZOS))
    assert answer["metrics"]["denoise_time"] == 0
    assert "denoising" not in answer["logs"]


def test_picture_i_is_that_of_seed_plus_i(server: Server, small: dict[str, Any]) -> None:
    three = server.pictures(**small, num_outputs=3)
    alone = [server.pictures(**{**small, "seed": 5 + i})[0] for i in range(3)]
    assert all(same(a, b) for a, b in zip(three, alone, strict=True))
    assert not same(three[0], three[1])


def test_the_same_request_gives_the_same_bytes_whatever_ran_before(
    server: Server, small: dict[str, Any], photo: Image.Image
) -> None:
    request = {**small, "output_format": "webp"}
    first = server(**request)["output"]
    server(**small, model="schnell", image=data_url(photo))
    server(**small, prompt_strength=0.5, image=data_url(photo), mask=data_url(photo))
    server(**{**small, "image": "/etc/passwd"})
    assert server(**request)["output"] == first
    assert server(**{**request, "go_fast": True})["output"] == first


def test_a_seed_that_was_chosen_is_told_and_repeats_the_picture(server: Server, small: dict[str, Any]) -> None:
    answer = server(**{name: value for name, value in small.items() if name != "seed"})
    seed = answer["metrics"]["seed"]
    assert 0 <= seed < 2**32
    assert f"seed {seed}" in answer["logs"]
    assert same(server.pictures(**{**small, "seed": seed})[0], decode_picture(answer["output"][0]))


@pytest.mark.parametrize("seed", [0, -1, 2**32, 2**63, 2**64 - 1, -(2**63) + 1])
def test_seeds_of_any_sign_and_size(server: Server, small: dict[str, Any], seed: int) -> None:
    """The generator uses 32 bits, and the log says where a seed has more."""
    answer = server(**{**small, "seed": seed})
    assert answer["status"] == "succeeded"
    assert answer["metrics"]["seed"] == (seed if seed < 2**63 else seed % 2**32)
    assert ("lowest 32 bits count" in answer["logs"]) == (seed != 0)
    assert f"the picture is that of seed {seed % 2**32}" in answer["logs"] or seed == 0
    assert same(server.pictures(**{**small, "seed": seed % 2**32})[0], decode_picture(answer["output"][0]))


@pytest.mark.parametrize(
    ("aspect_ratio", "megapixels", "size"), [("1:1", "0.25", (512, 512)), ("9:21", "0.25", (320, 768))]
)
def test_named_sizes(server: Server, aspect_ratio: str, megapixels: str, size: tuple[int, int]) -> None:
    pictures = server.pictures(prompt="x", aspect_ratio=aspect_ratio, megapixels=megapixels, num_inference_steps=1)
    assert pictures[0].size == size


def test_custom_sizes_are_rounded(server: Server) -> None:
    pictures = server.pictures(prompt="x", aspect_ratio="custom", width=263, height=265, num_inference_steps=1)
    assert pictures[0].size == (256, 272)


@pytest.mark.parametrize(("output_format", "kind"), [("webp", "WEBP"), ("jpg", "JPEG"), ("png", "PNG")])
def test_output_formats(server: Server, small: dict[str, Any], output_format: str, kind: str) -> None:
    answer = server(**{**small, "output_format": output_format, "output_quality": 30})
    assert decode_picture(answer["output"][0]).format == kind
    assert answer["output"][0].startswith(f"data:image/{kind.lower()};base64,")


def test_guidance_matters_to_dev_alone(server: Server, small: dict[str, Any]) -> None:
    for model, matters in (("dev", True), ("schnell", False)):
        low, high = (server.pictures(**small, model=model, guidance_scale=scale)[0] for scale in (0, 10))
        assert same(low, high) != matters


def test_metrics_and_a_log_line_per_phase(server: Server, small: dict[str, Any], photo: Image.Image) -> None:
    answer = server(**{**small, "prompt": "never seen before"}, num_outputs=2, image=data_url(photo))
    metrics = answer["metrics"]
    assert {name: type(value) for name, value in metrics.items()} == METRICS
    assert (metrics["mode"], metrics["precision"], metrics["seed"]) == ("img2img", PRECISION, 5)
    assert (metrics["width"], metrics["height"]) == (240, 304)
    parts = sum(metrics[f"{name}_time"] for name in ("encode", "denoise", "decode", "save"))
    assert 0 < parts <= metrics["predict_time"]
    for phase in ("read", "encode", "denoise", "decode", "save"):
        assert len(re.findall(rf"^{phase}: \d+\.\d\d\d s$", answer["logs"], re.MULTILINE)) == 1
    assert re.search(r"denoising: 100%\|.*\| 6/6 ", answer["logs"])  # 2 pictures of 3 steps


def test_what_is_done_otherwise_than_asked_is_said(server: Server, small: dict[str, Any]) -> None:
    logs = server(**{**small, "go_fast": True})["logs"]
    assert f"go_fast: custom sizes run in {PRECISION}" in logs
    ignored = {**small, "aspect_ratio": "1:1", "megapixels": "0.25", "num_inference_steps": 1}
    assert "width and height are ignored" in server(**ignored)["logs"]
    assert "width and height are ignored" not in server(**small)["logs"]


def test_what_a_request_most_likely_forgot_is_said(server: Server, small: dict[str, Any], photo: Image.Image) -> None:
    """The strengths are those from which diffusers starts with noise alone."""

    def logs(**inputs: Any) -> str:
        return str(server(**{**small, "image": data_url(photo), **inputs})["logs"])

    remains = "so nothing of the image remains"
    assert "prompt_strength 0.76: 4 of the 4 steps run, so nothing of the image remains; up to 0.75 something does" in (
        logs(model="schnell", num_inference_steps=4, prompt_strength=0.76)
    )
    most = logs(model="schnell", num_inference_steps=4, prompt_strength=0.75, guidance_scale=5)
    assert "prompt_strength 0.75: 3 of the 4 steps run\n" in most
    assert "schnell has no guidance: guidance_scale is ignored" in most
    white = data_url(Image.new("L", (9, 9), 255))
    masked = logs(model="schnell", num_inference_steps=1, prompt_strength=1, mask=white)
    assert "1 of the 1 steps run, so nothing of what is under the mask's white remains\n" in masked
    assert "mask: all of it is white" in masked
    assert "0 of the 3 steps run, so the image comes back as it is" in logs(prompt_strength=0)
    plain = logs(image="", mask="", model="schnell", num_inference_steps=28)
    assert "schnell: 28 steps are asked for; 4 are usual" in plain
    for never in (remains, "prompt_strength", "guidance"):
        assert never not in plain


def bad_inputs() -> dict[str, tuple[dict[str, Any], str]]:
    bomb = Image.new("1", (9500, 9500))
    assert bomb.width * bomb.height > MOST_INPUT_PIXELS
    dot = data_url(Image.new("RGB", (32, 32)))
    return {
        "path": ({"image": "/etc/passwd"}, "image must be an http(s) address or a data: URI"),
        "file URL": ({"image": "file:///etc/passwd"}, "image must be an http(s) address or a data: URI"),
        "private host": (
            {"image": "http://169.254.169.254/latest"},
            "169.254.169.254 is on a private network, which is refused: use a public address",
        ),
        "mask path": ({"image": dot, "mask": "/etc/hostname"}, "mask must be an http(s) address or a data: URI"),
        "text": ({"image": raw_data_url(b"hello", "text/plain")}, "image is not a picture that can be read"),
        "svg": ({"image": raw_data_url(b"<svg/>", "image/svg+xml")}, "image is not a picture that can be read"),
        "bomb": ({"image": data_url(bomb)}, "image has too many pixels"),
        "bad mask": ({"image": dot, "mask": raw_data_url(b"")}, "mask is not a picture that can be read"),
        "mask alone": ({"mask": dot}, "mask needs image"),
        "custom": ({"aspect_ratio": "custom", "width": 512}, 'aspect_ratio "custom" needs both width and height'),
        "huge seed": ({"seed": 2**64}, "seed must be a whole number from -9223372036854775807 to 18446744073709551615"),
        "seed + i": ({"seed": 2**64 - 3, "num_outputs": 4}, "seed must be a whole number from"),
        "negative seed": ({"seed": -(2**63)}, "seed must be a whole number from"),
        "more negative seed": ({"seed": -(2**63) - 1}, "seed must be a whole number from"),
        "astronomic seed": ({"seed": 10**40}, "seed must be a whole number from"),
        "no lora": ({"extra_lora": "pixar cars"}, "'pixar cars' does not name a LoRA: use a Replicate model"),
        "local lora": ({"replicate_weights": "/etc/passwd"}, "'/etc/passwd' does not name a LoRA: use a Replicate"),
        "lora without hub": (
            {"replicate_weights": "https://127.0.0.1:9/x.safetensors"},
            "127.0.0.1",
        ),
    }


@pytest.mark.parametrize(("inputs", "sentence"), bad_inputs().values(), ids=bad_inputs().keys())
def test_bad_input_is_one_sentence_and_the_next_request_is_served(
    server: Server, inputs: dict[str, Any], sentence: str
) -> None:
    assert sentence in failure(server(prompt="x", **inputs))
    assert server.pictures(prompt="x", megapixels="0.25", num_inference_steps=1)


@pytest.mark.parametrize(
    "prompt", ["", " ", "日本語 🎈", "a" * 20_000, "\x00\x01", "</s><pad><|endoftext|>", "e\u0301\u200f\ufeff"]
)
def test_every_prompt_is_drawn(server: Server, small: dict[str, Any], prompt: str) -> None:
    assert server(**{**small, "prompt": prompt, "num_inference_steps": 1})["status"] == "succeeded"


def test_numbers_written_as_floats_are_integers(server: Server, small: dict[str, Any]) -> None:
    """JSON has one kind of number, and a schema's "integer" takes 3.0."""
    floats = {k: float(v) if isinstance(v, int) and not isinstance(v, bool) else v for k, v in small.items()}
    answer = server(**floats, num_outputs=1.0, output_quality=80.0)
    assert answer["status"] == "succeeded", answer
    assert same(decode_picture(answer["output"][0]), server.pictures(**small)[0])


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b'{"input": 5}', b'{"input": []}', b'{"input": null}', b'{"input": {"prompt": null}}'],
)
def test_bodies_that_are_no_request_are_refused(server: Server, body: bytes) -> None:
    answer = requests.post(
        f"{server.url}/predictions", data=body, headers={"Content-Type": "application/json"}, timeout=None
    )
    assert 400 <= answer.status_code < 500
    assert "Traceback" not in answer.text


SLOW = {"prompt": "x", "aspect_ratio": "custom", "width": 1440, "height": 1440, "num_inference_steps": 50, "seed": 1}


def wait_until(condition: Callable[[], bool]) -> None:
    """As long as it takes: pytest ends a test in which it never comes true."""
    while not condition():
        time.sleep(0.01)


def is_busy(server: Server) -> bool:
    return bool(requests.get(f"{server.url}/health-check", timeout=None).json()["status"] == "BUSY")


def steps_shown(server: Server) -> int:
    """How many of the 50 steps of `SLOW` its progress bar has counted in the log."""
    return max((int(done) for done in re.findall(r"denoising:.* (\d+)/50 ", "\n".join(server.log))), default=0)


@pytest.mark.parametrize("steps", [0, 1], ids=["at once", "between two steps"])
def test_a_cancelled_prediction_stops_where_it_is_and_leaves_no_trace(
    server: Server, small: dict[str, Any], steps: int
) -> None:
    before = server.pictures(**small)[0]
    server.log.clear()
    wait_until_idle(server.url)
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(requests.put, f"{server.url}/predictions/slow", json={"input": SLOW}, timeout=None)
        wait_until(lambda: is_busy(server) and steps_shown(server) >= steps)
        requests.post(f"{server.url}/predictions/slow/cancel", timeout=None)
        assert answer.result().json()["status"] == "canceled"
    assert same(server.pictures(**small)[0], before)
    assert steps <= steps_shown(server) < SLOW["num_inference_steps"]


def test_a_second_request_is_told_to_wait(server: Server, small: dict[str, Any]) -> None:
    slow = {**small, "num_inference_steps": 50, "num_outputs": 4}
    with ThreadPoolExecutor() as pool:
        first = pool.submit(server, **slow)
        wait_until(lambda: is_busy(server))
        assert server.post({"input": small}).status_code == 409
        assert first.result()["status"] == "succeeded"


def test_outputs_do_not_pile_up(server: Server, environment: dict[str, str], small: dict[str, Any]) -> None:
    for _ in range(5):
        server(**{**small, "num_inference_steps": 1})
    assert len(list(Path(environment["TMPDIR"]).glob("flux-lora-*"))) == 2


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("FLUX_DEV", "/nowhere", "The environment variable FLUX_DEV is '/nowhere', which is neither a folder"),
        ("FLUX_DEVICE", "tpu", "The environment variable FLUX_DEVICE must be cpu, cuda or cuda:<number>"),
    ],
)
def test_a_wrong_environment_fails_the_setup_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, sentence: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as caught:
        Predictor().setup()
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_server_whose_setup_fails_says_why_and_no_more() -> None:
    log: list[str] = []
    with pytest.raises(ServerError) as caught, cog_server({"COG_WEIGHTS": "/nowhere/lora.tar"}, on_log=log.append):
        pass
    assert "/nowhere/lora.tar cannot be read: No such file or directory." in str(caught.value)
    assert "Traceback" not in "".join(log)
