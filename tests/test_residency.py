"""Device memory: the plan for FLUX.1's sizes on real cards, and what simulated small devices really do with it."""

import logging
import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from flux import plan
from flux.device import Memory, compute_dtype
from flux.models import Flux, Precisions, fill_device, fits, load_flux
from flux.pipelines import Job, decode, denoise, encode_prompt
from flux.plan import Moves, TooSmallError, plan_layout, plan_moves
from settings import GB

CPU = torch.device("cpu")
DTYPE = compute_dtype(CPU)
# FLUX.1's own: 11.9 billion parameters, in bf16 and with the blocks' linear layers in fp8
FLUX_1 = {
    "dev": 23.8 * GB,
    "dev fp8": 11.98 * GB,
    "schnell": 23.78 * GB,
    "schnell fp8": 11.96 * GB,
    "T5": 9.52 * GB,
    "CLIP": 0.25 * GB,
    "VAE": 0.17 * GB,
}
SIZES = {name: int(size) for name, size in FLUX_1.items()}
TRANSFORMERS = ["dev", "dev fp8", "schnell", "schnell fp8"]
ENCODERS = ["CLIP", "T5"]
WORK = int(0.85 * GB)


@pytest.mark.parametrize(
    ("card", "resident"),
    [
        (80, ["VAE", "CLIP", "T5", "dev", "dev fp8", "schnell"]),
        (48, ["VAE", "CLIP", "T5", "dev", "dev fp8"]),
        (24, ["VAE", "CLIP", "T5", "dev fp8"]),
        (16, ["VAE", "dev fp8"]),
    ],
)
def test_what_cards_do_with_flux_1(card: int, resident: list[str]) -> None:
    layout = plan_layout(SIZES, Memory(card * GB, 128 * GB), TRANSFORMERS, ENCODERS, WORK)
    assert layout.resident == resident
    assert not layout.on_disk
    assert sum(SIZES[name] for name in layout.resident) + WORK <= card * GB


def test_what_a_small_host_cannot_keep_is_read_from_the_disk() -> None:
    layout = plan_layout(SIZES, Memory(16 * GB, 32 * GB), TRANSFORMERS, ENCODERS, WORK)
    assert (layout.waiting, layout.on_disk) == (ENCODERS, ["schnell fp8"])  # what every new prompt moves comes first
    assert plan_layout(SIZES, Memory(80 * GB, 16 * GB), TRANSFORMERS, ENCODERS, WORK).on_disk == ["schnell fp8"]


@pytest.mark.parametrize("card", [8, 9, 12])
def test_a_card_that_is_too_small_for_anything_is_told_what_it_takes(card: int) -> None:
    with pytest.raises(TooSmallError) as caught:
        plan_layout(SIZES, Memory(card * GB, 128 * GB), TRANSFORMERS, ENCODERS, WORK)
    message = str(caught.value)
    assert message == (
        f"The device has {card}.0 GB for models, but schnell fp8 and VAE with 0.8 GB to work in need 13.0 GB at once."
    )


def moves_of(card: int, *requests: str) -> list[Moves]:
    """What a sequence of requests moves on an empty card: each encodes a new prompt, denoises, decodes."""
    resident: list[str] = []
    done = []
    for transformer in requests:
        for needed, work in ((ENCODERS, 0), ([transformer, "VAE"], WORK), (["VAE"], 2 * WORK)):
            moves = plan_moves(SIZES, card * GB, resident, needed, work)
            resident = [name for name in resident if name not in (*moves.evict, *needed)] + list(needed)
            assert sum(SIZES[name] for name in resident) + work <= card * GB
            done.append(moves)
    return [moves for moves in done if moves.evict or moves.load]


def test_the_least_recently_used_goes_first_and_no_more_than_has_to() -> None:
    assert moves_of(80, "dev", "dev fp8", "schnell", "dev", "schnell fp8")[-1] == Moves(["dev fp8"], ["schnell fp8"])
    assert moves_of(48, "dev", "dev fp8", "dev", "dev fp8")[3:] == []
    assert moves_of(48, "dev", "schnell")[-1] == Moves(["dev"], ["schnell"])


def test_on_a_card_of_16_gb_the_text_encoders_leave_before_denoising() -> None:
    assert moves_of(16, "dev fp8", "dev fp8") == [
        Moves([], ENCODERS),
        Moves(ENCODERS, ["dev fp8", "VAE"]),
        Moves(["dev fp8"], ENCODERS),
        Moves(ENCODERS, ["dev fp8"]),
    ]


@given(
    st.lists(st.integers(1, 30), min_size=5, max_size=5),
    st.integers(10, 60),
    st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=3, unique=True), max_size=12),
    st.integers(0, 5),
)
def test_moves_keep_within_the_device(sizes: list[int], device: int, requests: list[list[int]], work: int) -> None:
    parts = {str(i): size for i, size in enumerate(sizes)}
    resident: list[str] = []
    for numbers in requests:
        needed = [str(number) for number in numbers]
        if sum(parts[name] for name in needed) + work > device:
            with pytest.raises(TooSmallError):
                plan_moves(parts, device, resident, needed, work)
            continue
        moves = plan_moves(parts, device, resident, needed, work)
        assert not set(moves.evict) & set(needed)
        assert moves.evict == [name for name in resident if name not in needed][: len(moves.evict)]
        assert set(moves.load) == set(needed) - set(resident)
        stay = [name for name in resident if name not in moves.evict]
        if moves.evict:  # the last one that goes was in the way
            assert sum(parts[name] for name in {*stay, moves.evict[-1], *needed}) + work > device
        resident = [name for name in stay if name not in needed] + needed
        assert sum(parts[name] for name in resident) + work <= device


def picture(flux: Flux, prompt: str, on_step: object = None) -> Tensor:
    embeds = encode_prompt(flux, prompt)
    latents = denoise(flux, Job((256, 256), 2, 3.0, embeds), 1, on_step or (lambda: None))  # type: ignore[arg-type]
    decode(flux, latents, (256, 256))
    return latents


def precisions(models: dict[str, Precisions]) -> dict[str, Flux]:
    return {
        name: flux
        for model, both in models.items()
        for name, flux in ((model, both.exact), (f"{model} fp8", both.fast))
    }


def modules(models: dict[str, Precisions]) -> dict[str, nn.Module]:
    shared = models["dev"].exact
    transformers = {name: flux.transformer for name, flux in precisions(models).items()}
    return {**transformers, "T5": shared.text_encoder_2, "CLIP": shared.text_encoder, "VAE": shared.vae}


@pytest.fixture
def small_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models on devices of their size: activations would be most of it."""
    monkeypatch.setattr(plan, "DENOISING_BYTES_PER_PIXEL", 0)
    monkeypatch.setattr(plan, "DECODING_BYTES_PER_PIXEL", 0)


def device_of(checkpoints: dict[str, Path], *parts: str) -> Memory:
    """One that just holds these."""
    sizes = load_flux(checkpoints, CPU, DTYPE).popitem()[1].exact.residency.sizes
    return Memory(sum(sizes[part] for part in parts), 10 * GB)


@pytest.mark.usefixtures("small_work")
def test_a_small_device_moves_parts_and_draws_the_same_pictures(
    checkpoints: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    expected = {name: picture(flux, "a cat") for name, flux in precisions(load_flux(checkpoints, CPU, DTYPE)).items()}
    memory = device_of(checkpoints, "dev", "dev fp8", "VAE", "T5", "CLIP")
    models = load_flux(checkpoints, CPU, DTYPE, memory)
    residency = models["dev"].exact.residency
    assert residency.resident == []
    fill_device(models)
    assert residency.resident == ["VAE", "CLIP", "T5", "dev", "dev fp8"]

    def moved_by(name: str) -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.INFO):
            assert torch.equal(picture(precisions(models)[name], "a cat"), expected[name])
        for part, module in modules(models).items():
            held = sum(parameter.nbytes for parameter in module.parameters())
            assert bool(held) == (part in residency.resident)
        assert sum(residency.sizes[part] for part in residency.resident) <= memory.device
        return [message.split(":")[0] for message in caplog.messages]

    assert moved_by("dev") == moved_by("dev fp8") == []
    assert moved_by("schnell") == ["dev leaves the device", "schnell comes to the device"]
    *left, came = moved_by("schnell fp8")
    assert (left[0], came) == ("dev fp8 leaves the device", "schnell fp8 comes to the device")
    assert moved_by("schnell") == []  # the prompt's embedding is kept, so that the text encoders stay away


@pytest.mark.usefixtures("small_work")
def test_a_device_without_room_for_the_exact_transformer_has_room_for_its_twin(checkpoints: dict[str, Path]) -> None:
    memory = device_of(checkpoints, "dev", "VAE")
    memory = Memory(memory.device - 1, memory.host)
    flux = load_flux(checkpoints, CPU, DTYPE, memory)["dev"]
    assert (fits(flux.exact, (256, 256)), fits(flux.fast, (256, 256))) == (False, True)
    with pytest.raises(TooSmallError, match="but dev and VAE with"):
        picture(flux.exact, "a cat")
    picture(flux.fast, "a cat")


@pytest.mark.usefixtures("small_work")
def test_a_device_too_small_for_anything_fails_at_the_start(checkpoints: dict[str, Path]) -> None:
    memory = Memory(device_of(checkpoints, "dev fp8").device // 2, GB)
    with pytest.raises(TooSmallError, match="at once"):
        fill_device(load_flux(checkpoints, CPU, DTYPE, memory))


def test_out_of_memory_is_one_sentence_and_the_next_request_is_fine(checkpoints: dict[str, Path]) -> None:
    flux = load_flux(checkpoints, CPU, DTYPE)["dev"].exact
    expected = picture(flux, "a cat")

    scratch: list[weakref.ref[Tensor]] = []

    def too_much() -> None:
        activations = torch.zeros(3, 5, 7)
        scratch.append(weakref.ref(activations))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB\nand much more")

    with pytest.raises(RuntimeError) as caught:
        flux.residency.or_clear(lambda: picture(flux, "a cat", too_much))
    assert str(caught.value).startswith("The device ran out of memory")
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is caught.value.__context__ is None
    assert scratch[0]() is None
    assert flux.residency.resident == []
    assert not any(parameter.numel() for parameter in flux.transformer.parameters())
    assert torch.equal(picture(flux, "a cat"), expected)
