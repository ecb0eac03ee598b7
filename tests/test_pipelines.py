"""FLUX itself: the same pictures as diffusers, parts loaded once and never copied, prompts encoded once."""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxImg2ImgPipeline
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from flux import models as flux_models
from flux.device import compute_dtype
from flux.models import Flux, Precisions, load_flux
from flux.pipelines import Job, NotFiniteError, decode, denoise, encode_picture, encode_prompt, steps_to_run
from service.errors import InputError
from tests.conftest import SHARED_PARTS
from tests.oracle import diffusers_picture, load_oracle
from tools.random_flux import FluxSize, write_random_flux

CPU = torch.device("cpu")
DTYPE = compute_dtype(CPU)
PROMPT = "a blue square, and then a long list of other things: " + "more " * 80


@pytest.fixture(scope="module")
def models(checkpoints: dict[str, Path]) -> dict[str, Precisions]:
    return load_flux(checkpoints, CPU, DTYPE)


@pytest.fixture(scope="module")
def oracle(checkpoints: dict[str, Path]) -> dict[str, object]:
    return load_oracle(checkpoints)


def nothing() -> None:
    pass


def ours(flux: Flux, job: Job, seed: int) -> Image.Image:
    return decode(flux, denoise(flux, job, seed, nothing), job.size)


@pytest.mark.parametrize("model", ["dev", "schnell"])
@pytest.mark.parametrize(
    ("mode", "size", "steps", "strength"),
    [
        ("txt2img", (256, 256), 3, 1.0),
        ("txt2img", (512, 272), 2, 1.0),
        ("img2img", (256, 320), 4, 0.6),
        ("img2img", (336, 256), 3, 1.0),
        ("img2img", (256, 256), 5, 0.01),
        ("inpaint", (320, 256), 4, 0.8),
        ("inpaint", (256, 256), 3, 1.0),
    ],
)
def test_pictures_are_those_of_diffusers(
    models: dict[str, Precisions],
    oracle: dict[str, object],
    photo: Image.Image,
    model: str,
    mode: str,
    size: tuple[int, int],
    steps: int,
    strength: float,
) -> None:
    picture = photo.resize(size) if mode != "txt2img" else None
    mask = Image.radial_gradient("L").resize(size).point(lambda v: 255 * (v < 128)) if mode == "inpaint" else None
    flux = models[model].exact
    job = Job(
        size=size,
        steps=steps,
        guidance=2.5,
        embeds=encode_prompt(flux, PROMPT),
        strength=strength,
        posterior=encode_picture(flux, picture) if picture else None,
        mask=mask,
    )
    expected = diffusers_picture(
        oracle[model],
        model=model,
        seed=11,
        prompt=PROMPT,
        width=size[0],
        height=size[1],
        num_inference_steps=steps,
        guidance_scale=2.5,
        image=picture,
        mask=mask,
        strength=strength,
    )
    drawn = np.asarray(ours(flux, job, seed=11))
    assert np.array_equal(drawn, np.asarray(expected))
    assert drawn.std() > 10  # a picture, so that equality means something
    assert not np.array_equal(drawn, np.asarray(ours(flux, job, seed=12)))


def test_a_picture_that_is_not_finite_is_an_error_and_not_black(
    models: dict[str, Precisions], monkeypatch: pytest.MonkeyPatch
) -> None:
    flux = models["dev"].exact
    latents = torch.zeros(1, 256, 64, dtype=DTYPE)
    sentence = r"^The picture's numbers are not finite, and no LoRA is in use: the model's weights, .*, are at fault\.$"
    decode(flux, latents, (256, 256))
    with pytest.raises(NotFiniteError, match=sentence):
        decode(flux, latents.index_fill(1, torch.tensor(7), torch.inf), (256, 256))
    last = flux.vae.decoder.conv_out
    monkeypatch.setattr(last, "forward", lambda x: x.new_full((1, 3, *x.shape[2:]), torch.nan))
    with pytest.raises(NotFiniteError, match=sentence):
        decode(flux, latents, (256, 256))


def test_the_same_job_is_the_same_picture_on_several_threads(models: dict[str, Precisions], photo: Image.Image) -> None:
    """The other tests have one, where nothing else is set."""
    size, threads = (256, 320), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for flux in models["dev"].exact, models["dev"].fast:
            posterior = encode_picture(flux, photo.resize(size))
            job = Job(size, 1, 3.0, encode_prompt(flux, PROMPT), posterior=posterior, mask=photo.convert("L"))
            first, again = (ours(flux, job, seed=11) for _ in range(2))
            assert np.array_equal(np.asarray(first), np.asarray(again))
    finally:
        torch.set_num_threads(threads)


@given(st.integers(1, 50), st.floats(0, 1))
def test_the_count_of_steps_is_that_of_diffusers(steps: int, strength: float) -> None:
    class Scheduler:
        timesteps, order = list(range(steps)), 1

    class Pipeline:
        scheduler = Scheduler

    _, expected = FluxImg2ImgPipeline.get_timesteps(Pipeline, steps, strength, CPU)
    assert steps_to_run(steps, strength) == expected
    assert (steps_to_run(steps, 0), steps_to_run(steps, 1)) == (0, steps)


def test_the_two_models_share_what_is_the_same(models: dict[str, Precisions]) -> None:
    for part in SHARED_PARTS:
        assert len({id(getattr(flux, part)) for both in models.values() for flux in both}) == 1
    assert models["dev"].exact.transformer is not models["schnell"].exact.transformer


def test_a_part_that_differs_is_not_shared(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """A schnell folder with parts of its own: the same VAE, another T5, a config that differs in a comment only."""
    schnell, other = tmp_path / "schnell", tmp_path / "other"
    shutil.copytree(checkpoints["schnell"], schnell)
    write_random_flux(other, FluxSize(), model="dev", seed=9)
    shutil.copytree(checkpoints["dev"] / "vae", schnell / "vae")
    shutil.copytree(other / "text_encoder_2", schnell / "text_encoder_2")
    config = json.loads((schnell / "vae" / "config.json").read_text())
    (schnell / "vae" / "config.json").write_text(json.dumps(config | {"_name_or_path": "elsewhere"}))
    loaded = load_flux({"dev": checkpoints["dev"], "schnell": schnell}, CPU, DTYPE)
    dev, own = loaded["dev"].exact, loaded["schnell"].exact
    assert own.vae is dev.vae
    assert own.text_encoder_2 is not dev.text_encoder_2


def test_weights_are_memory_mapped_in_bf16(checkpoints: dict[str, Path]) -> None:
    """No copy of the file in memory: every weight lies in a mapping of the file itself."""
    models = load_flux(checkpoints, CPU, torch.bfloat16)
    mappings = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if str(checkpoints["dev"]) in line:
            start, end = (int(bound, 16) for bound in line.split()[0].split("-"))
            mappings.append((start, end))
    flux = models["dev"].exact
    for part in (flux.transformer, flux.vae, flux.text_encoder, flux.text_encoder_2):
        for name, weight in part.named_parameters():
            assert weight.dtype == torch.bfloat16
            assert any(start <= weight.data_ptr() < end for start, end in mappings), name


def test_float32_checkpoints_are_loaded_as_bf16(tmp_path: Path) -> None:
    write_random_flux(tmp_path, FluxSize(), model="dev", dtype=torch.float32)
    flux = load_flux({"dev": tmp_path}, CPU, torch.bfloat16)["dev"].exact
    assert {weight.dtype for weight in flux.transformer.parameters()} == {torch.bfloat16}
    assert {weight.dtype for weight in flux.text_encoder_2.parameters()} == {torch.bfloat16}


def test_the_same_prompt_again_costs_no_encoding(checkpoints: dict[str, Path]) -> None:
    models = load_flux(checkpoints, CPU, DTYPE)
    calls: list[str] = []
    models["dev"].exact.text_encoder_2.register_forward_hook(lambda *_: calls.append("t5"))
    models["dev"].exact.text_encoder.register_forward_hook(lambda *_: calls.append("clip"))
    first = encode_prompt(models["dev"].exact, "a cat")
    assert encode_prompt(models["dev"].exact, "a cat") is first
    assert calls == ["t5", "clip"]
    assert first.t5.shape[1] == 512
    assert encode_prompt(models["schnell"].exact, "a cat").t5.shape[1] == 256
    assert calls == ["t5", "clip"] * 2


def test_the_embedding_cache_is_bounded_in_bytes(checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    one = encode_prompt(load_flux(checkpoints, CPU, DTYPE)["dev"].exact, "size of one").nbytes
    monkeypatch.setattr(flux_models, "EMBEDDING_CACHE_BYTES", 2 * one)
    flux = load_flux(checkpoints, CPU, DTYPE)["dev"].exact
    for prompt in ("a", "b", "a", "c"):
        encode_prompt(flux, prompt)
    assert {prompt for prompt, _ in flux.embeddings} == {"a", "c"}  # b, the least recently used, was evicted
    monkeypatch.setattr(flux_models, "EMBEDDING_CACHE_BYTES", one - 1)
    tiny = load_flux(checkpoints, CPU, DTYPE)["dev"].exact
    assert encode_prompt(tiny, "too large to keep").nbytes == one
    assert not tiny.embeddings


def test_a_prompt_too_long_is_said_in_the_log(models: dict[str, Precisions], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        encode_prompt(models["schnell"].exact, "x" * 100)
        assert not caplog.messages
        encode_prompt(models["schnell"].exact, "x" * 400)
    assert caplog.messages == ["the prompt has 402 tokens, of which schnell reads the first 256"]


def test_a_prompt_of_megabytes_is_refused_before_it_is_read(models: dict[str, Precisions]) -> None:
    with pytest.raises(InputError, match=r"^prompt has 8000000 characters: send at most 50000\.$"):
        encode_prompt(models["schnell"].exact, "a " * 4_000_000)
    encode_prompt(models["schnell"].exact, "a" * 50_000)
