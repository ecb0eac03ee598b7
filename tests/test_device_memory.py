"""Weights on devices of every size: wherever pristine ones are kept, whatever moved, failed or was cancelled, the live
ones are bit for bit those of a process that has done nothing else."""

import functools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from flux import device, live, plan, pristine, residency, transfer
from flux.device import Memory
from flux.models import T5_BLOCKS, Flux, Precisions, fill_device, load_flux
from flux.pipelines import encode_prompt
from lora import merge
from tests.conftest import SHARED_PARTS
from tests.interrupts import CancelledError, interrupted_at
from tests.test_lora_loader import Set, merges, some_updates
from tools.random_flux import FluxSize, write_random_flux

CPU = torch.device("cpu")
MODULES = (device, live, merge, pristine, residency, transfer)
ROOMS = {  # what else than the VAE and one transformer a device holds, as parts; "copies" are pristine weights
    "everything": ("dev", "dev fp8", "schnell", "schnell fp8", "T5", "CLIP", "copies", "copies"),
    "80 GB": ("dev", "dev fp8", "copies", "T5", "CLIP"),
    "48 GB": ("dev", "dev fp8", "streamed T5", "CLIP"),
    "24 GB": ("dev fp8", "streamed T5", "CLIP"),
    "one at a time": ("dev",),
}


@pytest.fixture(scope="module", autouse=True)
def no_activations() -> Iterator[None]:
    """Tiny models on devices of their size: activations would be most of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "DENOISING_BYTES_PER_PIXEL", 0)
        patch.setattr(plan, "DECODING_BYTES_PER_PIXEL", 0)
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """With a T5 of several blocks, which can be streamed."""
    root = tmp_path_factory.mktemp("checkpoints")
    size = FluxSize(double_blocks=2, single_blocks=2, t5_layers=4)
    for seed, model in enumerate(("dev", "schnell")):
        write_random_flux(root / model, size, model=model, seed=seed)
    for part in SHARED_PARTS:
        shutil.rmtree(root / "schnell" / part)
    return {model: root / model for model in ("dev", "schnell")}


def load(folders: dict[str, Path], room: str | None) -> dict[str, Precisions]:
    """In bf16 on every machine: this is about weights, and nothing here multiplies in bf16 but merges."""
    if room is None:
        return load_flux(folders, CPU, torch.bfloat16)
    flux = load_flux(folders, CPU, torch.bfloat16)["dev"].exact
    sizes = flux.residency.sizes
    sizes["copies"] = sizes["dev"]
    sizes["streamed T5"] = flux.residency.streamed_size(flux.text_encoder_2, T5_BLOCKS)
    memory = Memory(sizes["VAE"] + sum(sizes[part] for part in ROOMS[room]), 10**9)
    models = load_flux(folders, CPU, torch.bfloat16, memory)
    fill_device(models)
    return models


def flux_of(models: dict[str, Precisions], name: str) -> Flux:
    model, _, fast = name.partition(" ")
    return models[model].fast if fast else models[model].exact


def contents(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in (*module.named_parameters(), *module.named_buffers())}


def same_bytes(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


@pytest.fixture(scope="module")
def loras(folders: dict[str, Path]) -> dict[str, Any]:
    shapes = load(folders, None)["schnell"].exact.pristine("transformer").shapes  # which dev has too
    return {name: some_updates(dict(shapes), seed, 3) for seed, name in enumerate("abc")}


@pytest.fixture(scope="module")
def fresh(folders: dict[str, Path], loras: dict[str, Any]) -> Callable[[str, Set], dict[str, Tensor]]:
    @functools.cache
    def weights_of(name: str, wanted: Set) -> dict[str, Tensor]:
        flux = flux_of(load(folders, None), name)
        flux.residency.change(flux.transformer, merges(loras, wanted))
        flux.residency.use(flux.transformer)
        return contents(flux.transformer)

    return weights_of


@pytest.fixture(scope="module")
def devices(folders: dict[str, Path]) -> dict[str, dict[str, Precisions]]:
    return {room: load(folders, room) for room in ROOMS}


sets = st.lists(
    st.tuples(st.sampled_from("abc"), st.sampled_from([-1.0, 0.3, 1.0])), max_size=2, unique_by=lambda one: one[0]
).map(tuple)
requests = st.tuples(
    st.sampled_from(["dev", "dev fp8", "schnell", "schnell fp8"]), sets, st.none() | st.integers(1, 9000)
)


@pytest.mark.parametrize("room", ROOMS)
@settings(max_examples=8, deadline=None)
@given(requests=st.lists(requests, min_size=2, max_size=6))
def test_weights_are_those_of_a_fresh_process_on_every_device(
    devices: dict[str, Any],
    loras: dict[str, Any],
    fresh: Callable[[str, Set], dict[str, Tensor]],
    room: str,
    requests: Any,
) -> None:
    """Requests for models, precisions and LoRAs on a device that goes on, some of them cancelled at any line. After a
    cancelled one comes what was there before it: what is half done must not pass for that."""
    last = None
    for name, wanted, line in requests:
        flux = flux_of(devices[room], name)
        if room == "24 GB" and flux.precision != "fp8":
            continue
        for asked, at in [((name, wanted), line), (last, None)] if line and last else [((name, wanted), None)]:
            if ask(devices[room], loras, asked, at):
                check(flux_of(devices[room], asked[0]), fresh(asked[0], tuple(sorted(asked[1]))))
                last = asked


def ask(models: dict[str, Precisions], loras: dict[str, Any], asked: tuple[str, Set], line: int | None) -> bool:
    """Whether it was done and not cancelled."""
    flux = flux_of(models, asked[0])
    try:
        with interrupted_at(line or 0, MODULES):
            flux.residency.change(flux.transformer, merges(loras, asked[1]))
            flux.residency.use(flux.transformer, flux.vae)
    except CancelledError:
        return False
    return True


def check(flux: Flux, expected: dict[str, Tensor]) -> None:
    for parameter, value in contents(flux.transformer).items():
        assert same_bytes(value, expected[parameter]), parameter
    assert flux.residency.memory is not None
    assert sum(flux.residency.sizes[part] for part in flux.residency.resident) <= flux.residency.memory.device


def test_fp8_weights_from_host_memory_that_broke_off_are_known_to_have(
    folders: dict[str, Path], loras: dict[str, Any]
) -> None:
    flux = flux_of(load(folders, "24 GB"), "dev fp8")
    flux.residency.use(flux.transformer, flux.vae)
    assert flux.residency.live(flux.transformer).host_copy
    lora = merges(loras, (("a", 1.0),))
    flux.residency.change(flux.transformer, lora)
    expected = contents(flux.transformer)
    flux.residency.live(flux.transformer).pristine.copies.clear()
    for line in range(1, 80, 3):
        with pytest.raises(CancelledError), interrupted_at(line, [live], ("_restore_from_host", "_restore")):
            flux.residency.change(flux.transformer, {})
        flux.residency.change(flux.transformer, lora)
        check(flux, expected)
        flux.residency.live(flux.transformer).pristine.copies.clear()


def test_a_streamed_text_encoder_embeds_as_a_resident_one_with_loras_too(folders: dict[str, Path]) -> None:
    models, streamed = load(folders, None), load(folders, "48 GB")
    residency = streamed["dev"].exact.residency
    t5 = streamed["dev"].exact.text_encoder_2
    assert "T5" in residency.resident
    assert not any(parameter.numel() for parameter in t5.encoder.block.parameters())
    updates = some_updates(dict(models["dev"].exact.pristine("text_encoder_2").shapes), 1, 3)
    for number, changes in enumerate(({}, {"a": updates}, {})):
        wanted = merges(changes, tuple((name, 0.5) for name in changes))
        embeds = []
        for one in (models["dev"].exact, streamed["dev"].exact):
            one.residency.change(one.text_encoder_2, wanted)
            embeds.append(encode_prompt(one, "a cat", number))
        assert torch.equal(embeds[0].t5, embeds[1].t5)
        assert torch.equal(embeds[0].clip, embeds[1].clip)
        assert not any(parameter.numel() for parameter in t5.encoder.block.parameters())


def test_an_encoding_that_is_cancelled_leaves_no_block_behind(folders: dict[str, Path]) -> None:
    flux = load(folders, "48 GB")["dev"].exact
    expected = encode_prompt(flux, "a cat", "first")

    def cancel(*_: object) -> None:
        raise CancelledError

    hook = flux.text_encoder_2.encoder.block[0].register_forward_pre_hook(cancel)
    with pytest.raises(CancelledError):
        encode_prompt(flux, "a cat", "second")
    hook.remove()
    flux.residency.use(flux.text_encoder_2)
    assert not any(parameter.numel() for parameter in flux.text_encoder_2.encoder.block.parameters())
    assert torch.equal(encode_prompt(flux, "a cat", "third").t5, expected.t5)


def test_another_lora_reads_nothing_from_the_host_where_the_pristine_weights_are_on_the_device(
    folders: dict[str, Path], loras: dict[str, Any]
) -> None:
    """Both precisions, from the first LoRA on; and a part that comes with its LoRAs has each weight sent once."""
    models = load(folders, "80 GB")
    sent = counted(models)
    for name in ("dev", "dev fp8", "dev", "dev fp8"):
        flux = flux_of(models, name)
        for wanted in ((("a", 1.0),), (("a", 0.3), ("b", 1.0)), ()):
            flux.residency.change(flux.transformer, merges(loras, wanted))
            flux.residency.use(flux.transformer, flux.vae)
    assert sent() == 0
    models["dev"].exact.residency.evict_all()
    flux = models["dev"].exact
    flux.residency.change(flux.transformer, merges({"a": only_low_rank(loras["a"])}, (("a", 1.0),)))
    flux.residency.use(flux.transformer)
    assert sent() == flux.residency.sizes["dev"]


def only_low_rank(updates: dict[str, Any]) -> dict[str, Any]:
    return {name: update for name, update in updates.items() if not update.reads}


def counted(models: dict[str, Precisions]) -> Callable[[], int]:
    """How many bytes the ring has sent since this call."""
    ring = models["dev"].exact.residency.stream.__self__  # type: ignore[attr-defined]
    before = ring.bytes_sent
    return lambda: ring.bytes_sent - before
