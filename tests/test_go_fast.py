"""go_fast as a user meets it, through Cog's real server; and what runs out of memory, or moves LoRAs about."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image

import predict
from flux import plan
from flux.device import Memory, compute_dtype
from flux.models import Precisions, load_flux
from flux.pipelines import Job, denoise, encode_prompt
from flux.plan import TooSmallError
from lora_loader import LoraLoader
from phases import Phases
from settings import read_settings
from tests.conftest import Server, data_url, same
from tests.oracle import load_oracle
from tests.test_lora_requests import Factors, as_reference, distance, random_factors

CPU = torch.device("cpu")
DTYPE = compute_dtype(CPU)


@pytest.fixture(scope="module")
def oracle(checkpoints: dict[str, Path]) -> dict[str, FluxPipeline]:
    return load_oracle(checkpoints)


@pytest.fixture(scope="module")
def style(oracle: dict[str, FluxPipeline]) -> Factors:
    return random_factors(oracle["dev"], ("transformer", "text_encoder"), 1)


@pytest.fixture
def quick() -> dict[str, Any]:
    """A named size, since custom ones do not run in fp8."""
    inputs = {"prompt": "a red circle", "megapixels": "0.25", "aspect_ratio": "9:21", "output_format": "png"}
    return {**inputs, "num_inference_steps": 2, "seed": 5, "disable_safety_checker": True}


def test_every_mode_runs_in_fp8_and_repeats(server: Server, quick: dict[str, Any], photo: Image.Image) -> None:
    mask = data_url(Image.linear_gradient("L"))
    picture = {"image": data_url(photo)}
    for mode in ({}, picture, {**picture, "mask": mask}, {"model": "schnell"}):
        inputs = {**quick, **mode}
        exact = server(**inputs)
        first, again = (server(**inputs, go_fast=True) for _ in range(2))
        assert first["metrics"]["precision"] == "fp8" != exact["metrics"]["precision"]
        assert first["output"] == again["output"] != exact["output"]
        assert server(**inputs)["output"] == exact["output"]


def test_custom_sizes_run_unquantized_and_say_so(server: Server, small: dict[str, Any], photo: Image.Image) -> None:
    exact, asked = server(**small), server(**small, go_fast=True)
    assert asked["output"] == exact["output"]
    assert asked["metrics"]["precision"] == exact["metrics"]["precision"] != "fp8"
    assert f"go_fast: custom sizes run in {exact['metrics']['precision']}" in asked["logs"]
    with_image = server(**small, image=data_url(photo), go_fast=True)  # which has a size of its own
    assert with_image["metrics"]["precision"] == "fp8"
    assert "custom sizes" not in with_image["logs"]


def test_loras_are_stronger_by_the_multiplier_and_gone_afterwards(
    server: Server, quick: dict[str, Any], small: dict[str, Any], style: Factors
) -> None:
    lora = as_reference(style)
    plain = server.pictures(**quick, go_fast=True)[0]
    answer = server(
        **quick, go_fast=True, replicate_weights=lora, lora_scale=0.4, extra_lora=lora, extra_lora_scale=0.2
    )
    assert "the data: URI at 0.6 " in answer["logs"]
    assert "the data: URI at 0.3 " in answer["logs"]
    with_lora = server.pictures(**quick, go_fast=True, replicate_weights=lora, lora_scale=0.4)[0]
    at_its_own = server.pictures(**quick, replicate_weights=lora, lora_scale=0.6)[0]
    assert distance(with_lora, at_its_own) < distance(with_lora, plain) / 4
    assert same(server.pictures(**quick, go_fast=True)[0], plain)
    custom = server.pictures(**small, go_fast=True, replicate_weights=lora, lora_scale=0.4)[0]
    assert same(custom, server.pictures(**small, replicate_weights=lora, lora_scale=0.4)[0])


def test_loras_are_there_again_when_their_part_comes_back(
    checkpoints: dict[str, Path], style: Factors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a device that holds the text encoders or a transformer, each request asks for LoRAs while one is away."""
    monkeypatch.setattr(plan, "DENOISING_BYTES_PER_PIXEL", 0)
    settings = read_settings({"LORA_CACHE_DIR": str(tmp_path)})
    roomy = load_flux(checkpoints, CPU, DTYPE)
    sizes = roomy["dev"].exact.residency.sizes
    tight = load_flux(checkpoints, CPU, DTYPE, Memory(sizes["dev"] + sizes["VAE"], 10**9))

    asked = [(False, 1.0), (True, 1.0), (False, 0), (False, 0.5), (True, 0), (True, 1.5)]  # go_fast, strength

    def drawn(models: dict[str, Precisions]) -> list[torch.Tensor]:
        loader, results = LoraLoader(models, settings), []
        for i, (fast, strength) in enumerate(asked):
            flux = models["dev"].fast if fast else models["dev"].exact
            loras = loader.load("dev", (as_reference(style), strength), (None, 1.0), Phases())
            embeds = encode_prompt(flux, f"prompt {i}", loader.apply(flux, loras))
            results.append(denoise(flux, Job((256, 256), 2, 3.0, embeds), 1, lambda: None))
        return results

    for expected, latents in zip(drawn(roomy), drawn(tight), strict=True):
        assert torch.equal(expected, latents)
    assert len(tight["dev"].exact.residency.resident) < len(roomy["dev"].exact.residency.resident)


def test_out_of_memory_costs_only_its_request(
    environment: dict[str, str], quick: dict[str, Any], style: Factors, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    predictor = predict.Predictor()
    predictor.setup()
    defaults = {name: one.default.default for name, one in inspect.signature(predictor.run).parameters.items()}
    request = {**defaults, **quick, "go_fast": True, "replicate_weights": as_reference(style)}
    expected = predictor.run(**request)[0].read_bytes()
    with monkeypatch.context() as broken:
        broken.setattr(predict, "decode", out_of_memory)
        with pytest.raises(RuntimeError, match=r"^The device ran out of memory .*[.]$"):
            predictor.run(**request)
    assert predictor.run(**request)[0].read_bytes() == expected
    predictor.output_folders.cleanup()


def test_a_gpu_that_holds_only_fp8_runs_fp8_and_says_so(
    environment: dict[str, str],
    checkpoints: dict[str, Path],
    quick: dict[str, Any],
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(plan, "DENOISING_BYTES_PER_PIXEL", 0)
    monkeypatch.setattr(plan, "DECODING_BYTES_PER_PIXEL", 0)
    sizes = load_flux(checkpoints, CPU, DTYPE)["dev"].exact.residency.sizes
    room = max(sizes["dev fp8"] + sizes["VAE"], sizes["T5"] + sizes["CLIP"])
    monkeypatch.setattr(predict, "memory_of", lambda _: Memory(room, 10**9))
    predictor = predict.Predictor()
    predictor.setup()
    defaults = {name: one.default.default for name, one in inspect.signature(predictor.run).parameters.items()}
    with caplog.at_level("INFO"):
        drawn = Image.open(predictor.run(**{**defaults, **quick})[0])
    assert any("cannot hold dev in" in message and "it runs in fp8" in message for message in caplog.messages)
    assert same(drawn, server.pictures(**quick, go_fast=True)[0])
    predictor.output_folders.cleanup()

    monkeypatch.setattr(predict, "memory_of", lambda _: Memory(room // 2, 10**9))
    with pytest.raises(TooSmallError, match=r"^The device has .* at once[.]$"):
        predict.Predictor().setup()


def out_of_memory(*_: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB\nand much more")
