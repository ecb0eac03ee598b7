"""LoRAs as a user meets them: named in a request to Cog's real server, seen in the picture, gone with the next one."""

import inspect
import io
import itertools
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image
from safetensors.torch import load, save
from torch import Tensor, nn

import predict
from flux.models import load_flux
from flux.residency import DeviceMemoryError
from lora import names
from lora.errors import LoraError
from lora_loader import LoraLoader
from phases import Phases
from settings import read_settings
from tests.conftest import Server, failure, raw_data_url, same
from tests.oracle import load_oracle, small_picture
from tools.server import cog_server

RANK = 4
Factors = dict[str, tuple[Tensor, Tensor]]  # module, with its component before it -> up, down


def random_factors(pipeline: FluxPipeline, components: tuple[str, ...], seed: int) -> Factors:
    """For every attention and feed-forward layer, large enough to be seen."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{component}.{name}": (
            0.4 * torch.randn(module.out_features, RANK, generator=generator),
            0.4 * torch.randn(RANK, module.in_features, generator=generator),
        )
        for component in components
        for name, module in getattr(pipeline, component).named_modules()
        if isinstance(module, nn.Linear) and any(part in name.lower() for part in ("attn", "attention", "ff", "mlp"))
    }


def as_file(factors: Factors) -> bytes:
    """In diffusers' layout, half of alpha's default."""
    tensors: dict[str, Tensor] = {}
    for module, (up, down) in factors.items():
        tensors[f"{module}.lora_A.weight"] = down.contiguous()
        tensors[f"{module}.lora_B.weight"] = up.contiguous()
        tensors[f"{module}.alpha"] = torch.tensor(RANK / 2)
    return save(tensors)


def as_reference(factors: Factors) -> str:
    return raw_data_url(as_file(factors), "application/octet-stream")


class Merged:
    """diffusers' pipeline whose weights are W + the sum of strength / 2 * up @ down, in float64 and then rounded."""

    def __init__(self, pipeline: FluxPipeline, *weighted: tuple[Factors, float]) -> None:
        self.pipeline, self.weighted = pipeline, weighted
        self.before: dict[nn.Parameter, Tensor] = {}

    @torch.no_grad()
    def __enter__(self) -> FluxPipeline:
        sums: dict[str, Tensor] = {}
        for factors, strength in self.weighted:
            for name, (up, down) in factors.items():
                sums[name] = sums.get(name, 0) + strength * 0.5 * (up.double() @ down.double())
        for name, difference in sums.items():
            component, _, module = name.partition(".")
            weight = getattr(self.pipeline, component).get_submodule(module).weight
            self.before[weight] = weight.clone()
            weight.copy_(weight.double() + difference)
        return self.pipeline

    @torch.no_grad()
    def __exit__(self, *_: object) -> None:
        for weight, value in self.before.items():
            weight.copy_(value)


@pytest.fixture(scope="module")
def oracle(checkpoints: dict[str, Path]) -> dict[str, FluxPipeline]:
    return load_oracle(checkpoints)


@pytest.fixture(scope="module")
def style(oracle: dict[str, FluxPipeline]) -> Factors:
    return random_factors(oracle["dev"], ("transformer",), 1)


@pytest.fixture(scope="module")
def subject(oracle: dict[str, FluxPipeline]) -> Factors:
    """One that was trained with both text encoders."""
    return random_factors(oracle["dev"], ("transformer", "text_encoder", "text_encoder_2"), 2)


def distance(a: Image.Image, b: Image.Image) -> float:
    """The mean difference, in levels of 256."""
    return float(np.abs(np.asarray(a, dtype=float) - np.asarray(b, dtype=float)).mean())


@pytest.mark.parametrize("model", ["dev", "schnell"])
def test_the_picture_is_that_of_diffusers_with_merged_weights(
    server: Server, oracle: dict[str, FluxPipeline], small: dict[str, Any], style: Factors, subject: Factors, model: str
) -> None:
    """Two LoRAs at their strengths, text encoders included. Sums in float32 and in float64 differ in last bits."""
    request = {**small, "model": model}
    plain = server.pictures(**request)[0]
    [ours] = server.pictures(
        **request,
        replicate_weights=as_reference(style),
        lora_scale=0.7,
        extra_lora=as_reference(subject),
        extra_lora_scale=-0.4,
    )
    with Merged(oracle[model], (style, 0.7), (subject, -0.4)) as pipeline:
        expected = small_picture(pipeline, model, small)
    assert distance(ours, plain) > 5
    # bfloat16 is as coarse as a picture's levels: what differs in a last bit there is seen as one
    assert distance(ours, expected) < (1.0 if oracle[model].dtype == torch.bfloat16 else 0.1)
    assert same(server.pictures(**request)[0], plain)


def test_what_a_lora_was_asked_for_is_what_the_pictures_show(
    server: Server, small: dict[str, Any], style: Factors, subject: Factors
) -> None:
    a, b = as_reference(style), as_reference(subject)
    plain = server.pictures(**small)[0]

    def drawn(**inputs: Any) -> Image.Image:
        return server.pictures(**small, **inputs)[0]

    with_a, with_b, with_both = (
        drawn(replicate_weights=a),
        drawn(extra_lora=b),
        drawn(replicate_weights=a, extra_lora=b),
    )
    for one, other in itertools.combinations((plain, with_a, with_b, with_both), 2):
        assert not same(one, other)
    assert same(drawn(extra_lora=a), with_a)  # an extra LoRA alone counts
    assert same(drawn(replicate_weights=b, extra_lora=a), with_both)
    assert same(drawn(replicate_weights=a, lora_scale=0), plain)
    assert same(drawn(replicate_weights="", extra_lora=" "), plain)
    assert same(drawn(replicate_weights=a, extra_lora=b, extra_lora_scale=0), with_a)


def test_metrics_and_log_say_which_loras_ran(server: Server, small: dict[str, Any], oracle: dict[str, Any]) -> None:
    new = as_reference(random_factors(oracle["dev"], ("transformer",), 77))
    origins = []
    for reference in (new, new, None):
        answer = server(**small, **({"replicate_weights": reference, "lora_scale": 0.5} if reference else {}))
        origins.append(answer["metrics"]["lora_cache"])
        assert answer["metrics"]["lora_fetch_time"] >= 0
        assert ("the data: URI at 0.5 " in answer["logs"]) == (reference is not None)
    assert origins == ["download", "memory", "none"]


def test_the_log_says_which_trigger_words_the_prompt_has(
    server: Server, small: dict[str, Any], style: Factors, subject: Factors
) -> None:
    def with_word(factors: Factors, word: str) -> str:
        content = save(load(as_file(factors)), {"modelspec.trigger_phrase": word})
        return raw_data_url(content, "application/octet-stream")

    loras = {"replicate_weights": with_word(style, "TOK, my cat"), "extra_lora": with_word(subject, "TOK")}
    answer = server(**{**small, "prompt": "Tokyo, mycats"}, **loras)
    assert "trigger words: TOK, my cat; none of them is in the prompt\n" in answer["logs"]
    assert answer["metrics"]["lora_trigger_words"] == "TOK, my cat"
    answer = server(**{**small, "prompt": "My Cat"}, **loras, lora_scale=0)
    assert "trigger words: TOK; none of them" in answer["logs"]
    answer = server(**{**small, "prompt": "My Cat"}, **loras)
    assert "trigger words: TOK, my cat; in the prompt: my cat\n" in answer["logs"]
    answer = server(**small, replicate_weights=as_reference(style))
    assert "trigger words" not in answer["logs"]
    assert answer["metrics"]["lora_trigger_words"] == ""


def test_a_lora_is_called_as_its_request_calls_it(checkpoints: dict[str, Path], tmp_path: Path, style: Factors) -> None:
    """In memory it is one, by its content; its name is each requester's own."""
    (tmp_path / "mine.safetensors").write_bytes(as_file(style))
    folders = {"LORA_CACHE_DIR": str(tmp_path / "cache"), "LORA_FOLDER": str(tmp_path)}
    models = load_flux({"dev": checkpoints["dev"]}, torch.device("cpu"), torch.bfloat16)
    loader, names = LoraLoader(models, read_settings(folders)), []
    for reference in (as_reference(style), "mine.safetensors"):
        [active] = loader.load("dev", (reference, 1.0), (None, 1.0), Phases())
        names.append((active.name, active.origin))
    assert names == [("the data: URI", "download"), ("mine.safetensors", "memory")]


def test_a_lora_that_does_not_fit_costs_only_its_request(
    server: Server, small: dict[str, Any], style: Factors, subject: Factors
) -> None:
    before = server.pictures(**small, replicate_weights=as_reference(style))[0]
    wrong = {name: (up, torch.cat([down, down], dim=1)) for name, (up, down) in style.items()}
    answer = server(**small, replicate_weights=as_reference(subject), extra_lora=as_reference(wrong))
    assert "the data: URI" in failure(answer)
    assert same(server.pictures(**small, replicate_weights=as_reference(style))[0], before)


def test_a_picture_that_is_not_finite_is_blamed_on_the_loras_in_use(
    server: Server, small: dict[str, Any], style: Factors, subject: Factors
) -> None:
    """Numbers that each weight can hold, but not the activations."""
    request = {**small, "extra_lora": as_reference(style), "extra_lora_scale": 0.5}
    before = server(**request)["output"]
    huge = {name: (1e15 * up, 1e15 * down) for name, (up, down) in subject.items()}
    answer = server(**{**request, "replicate_weights": as_reference(huge), "lora_scale": 3})
    assert failure(answer) == (
        "With the data: URI at strength 3 and the data: URI at strength 0.5 the picture's numbers are not finite: use "
        "a lower strength or another LoRA."
    )
    assert not answer.get("output")
    assert server(**request)["output"] == before


def test_a_fine_tune_brings_its_own_lora(
    environment: dict[str, str], server: Server, small: dict[str, Any], style: Factors, subject: Factors, tmp_path: Path
) -> None:
    """`COG_WEIGHTS`: a tar, as trainers make it. It is the main LoRA wherever a request names none."""
    archive = tmp_path / "trained_model.tar"
    content = as_file(style)
    with tarfile.open(archive, "w") as tar:
        member = tarfile.TarInfo("output/flux_train/lora.safetensors")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
    a, b = as_reference(style), as_reference(subject)
    log: list[str] = []
    with cog_server({**environment, "COG_WEIGHTS": str(archive)}, on_log=log.append) as running:
        assert "weights merged" in "".join(log)  # before the first request
        own = Server(running.url)
        for request in ({}, {"lora_scale": 0.5}, {"model": "schnell"}, {"extra_lora": b}):
            expected = server.pictures(**small, replicate_weights=a, **request)[0]
            assert same(own.pictures(**small, **request)[0], expected)
        assert same(own.pictures(**small, replicate_weights=b)[0], server.pictures(**small, replicate_weights=b)[0])
        assert same(own.pictures(**small, lora_scale=0)[0], server.pictures(**small)[0])


def test_loras_stay_in_memory_within_its_bounds(
    checkpoints: dict[str, Path], tmp_path: Path, style: Factors, subject: Factors
) -> None:
    models = load_flux({"dev": checkpoints["dev"]}, torch.device("cpu"), torch.bfloat16)
    a, b = as_reference(style), as_reference(subject)

    def origins(loader: LoraLoader, *references: str) -> list[str]:
        found: list[str] = []
        for reference in references:
            [active] = loader.load("dev", (reference, 1.0), (None, 1.0), Phases())
            loader.apply(models["dev"].exact, [active])
            found.append(active.origin)
        return found

    folder = {"LORA_CACHE_DIR": str(tmp_path)}
    loader = LoraLoader(models, read_settings(folder))
    assert origins(loader, a, b, a) == ["download", "download", "memory"]
    for file in tmp_path.glob("files/*"):  # nobody reads the files again
        file.write_bytes(bytes(file.stat().st_size))
    assert origins(loader, b, a, b, a) == ["memory"] * 4

    for file in tmp_path.glob("files/*"):
        file.unlink()
    one = len(as_file(subject)) * 1.2 / 1e9
    loader = LoraLoader(models, read_settings({**folder, "LORA_RAM_GB": str(one)}))
    assert origins(loader, a, b, b, a) == ["download", "download", "memory", "disk"]

    def fill_the_memory() -> None:
        raise MemoryError

    with pytest.raises(DeviceMemoryError):
        loader.residency.or_clear(fill_the_memory)
    assert origins(loader, a) == ["disk"]


def test_a_new_dialect_is_one_entry_of_one_table(
    environment: dict[str, str],
    server: Server,
    small: dict[str, Any],
    style: Factors,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """From the request to the picture; neither prefix nor suffix nor one layer is called as anybody else calls it."""
    acme = names.Dialect(
        "Acme",
        prefixes={"acme:": "transformer"},
        layers={"block {}, image out": ("transformer_blocks.{}.attn.to_out.0",)},
        suffixes={"down": "=in", "up": "=out", "alpha": "=alpha"},
    )
    suffixes = {".lora_A.weight": "=in", ".lora_B.weight": "=out", ".alpha": "=alpha"}
    tensors = {}
    for key, tensor in load(as_file(style)).items():
        suffix = next(suffix for suffix in suffixes if key.endswith(suffix))
        name = key.removeprefix("transformer.").removesuffix(suffix)
        for i in (0, 1):
            name = name.replace(f"transformer_blocks.{i}.attn.to_out.0", f"block {i}, image out")
        tensors[f"acme:{name}{suffixes[suffix]}"] = tensor
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    predictor = predict.Predictor()
    predictor.setup()
    defaults = {name: one.default.default for name, one in inspect.signature(predictor.run).parameters.items()}
    request = {**defaults, **small, "replicate_weights": raw_data_url(save(tensors), "application/octet-stream")}
    with pytest.raises(LoraError, match="not a LoRA"):
        predictor.run(**request)
    monkeypatch.setattr(names, "DIALECTS", (*names.DIALECTS, acme))
    with caplog.at_level("INFO"):
        drawn = Image.open(predictor.run(**request)[0])
    assert f"Acme, rank {RANK}" in caplog.text
    assert same(drawn, server.pictures(**small, replicate_weights=as_reference(style))[0])
    predictor.output_folders.cleanup()
