"""Device memory: the plan for FLUX.1's sizes on real cards, and what simulated small devices really do with it."""

import logging
import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from bench.cards import CARDS, tour
from flux import plan
from flux.device import Memory, compute_dtype
from flux.models import Flux, Precisions, fill_device, fits, load_flux
from flux.pipelines import Job, decode, denoise, encode_prompt
from flux.plan import CLIP, T5, VAE, Layout, Sizes, TooSmallError, plan_layout, plan_moves, plan_room
from settings import GB

CPU = torch.device("cpu")
DTYPE = compute_dtype(CPU)
TOUCHED = ".attn.to_q"  # of the blocks' layers, so that the LoRAs of these tests are quick: 1.08 GB in bf16
TOUCHED_BYTES = 57 * 3072 * 3072 * 2
T5_BLOCKS_BYTES = 9_261_420_544
DEV, DEV_FP8, SCHNELL_FP8 = 23_802_816_640, 11_980_728_448, 11_980_728_448


@pytest.mark.parametrize(
    ("card", "start", "new_prompt", "another_lora", "dev_and_schnell"),
    [
        ("H100", ["VAE", "CLIP", "T5", "dev", "dev fp8"], 0, 0, 0),
        ("A100", ["VAE", "CLIP", "T5", "dev", "dev fp8"], 0, 0, 0),
        ("L40S", ["VAE", "CLIP", "T5", "dev", "dev fp8"], T5_BLOCKS_BYTES, 0, DEV),
        ("RTX 4090", ["VAE", "CLIP", "T5", "dev fp8"], T5_BLOCKS_BYTES, 0, SCHNELL_FP8),
        ("L4", ["VAE", "CLIP", "T5", "dev fp8"], T5_BLOCKS_BYTES, 0, SCHNELL_FP8),
        ("16 GB", ["VAE", "dev fp8"], 9_770_742_272, TOUCHED_BYTES, SCHNELL_FP8),  # all of T5 and CLIP
    ],
)
def test_what_real_cards_hold_of_flux_1_and_what_moves_between_requests(
    card: str, start: list[str], new_prompt: int, another_lora: int, dev_and_schnell: int
) -> None:
    """The real plan and the real loads and merges, on parts of FLUX.1's shapes; bytes from host memory."""
    assert tour(CARDS[card], TOUCHED) == (
        start,
        {
            "new prompt": new_prompt,
            "another LoRA": another_lora,
            "another LoRA, go_fast": another_lora,
            "dev and dev go_fast": 0,
            "dev and schnell": dev_and_schnell,
        },
    )


def test_a_lora_on_every_layer_crosses_once_where_its_pristine_weights_find_no_room() -> None:
    every_layer = 23_668_457_472
    moved = tour(CARDS["RTX 4090"])[1]
    assert moved["another LoRA"] == moved["another LoRA, go_fast"] == every_layer


# FLUX.1's own: 11.9 billion parameters, in bf16 and with the blocks' linear layers in fp8
PARTS = {name: int(size * GB) for name, size in {"dev": 23.8, "dev fp8": 11.98, "schnell": 23.78}.items()}
PARTS |= {name: int(size * GB) for name, size in {"schnell fp8": 11.96, T5: 9.52, CLIP: 0.25, VAE: 0.17}.items()}
SIZES = Sizes(PARTS, {T5: int(0.65 * GB)})
TRANSFORMERS = ["dev", "dev fp8", "schnell", "schnell fp8"]
WORK, ROOM = int(0.85 * GB), int(2.2 * GB)


def layout(card: float, host: float = 128) -> Layout:
    return plan_layout(SIZES, Memory(int(card * GB), int(host * GB)), TRANSFORMERS, WORK, ROOM)


def test_two_precisions_come_before_whole_encoders_and_pristine_weights_before_a_second_model() -> None:
    assert (layout(45).resident, layout(45).streamed) == ([VAE, CLIP, T5, "dev", "dev fp8"], [T5])
    assert (layout(49).resident, layout(49).streamed) == ([VAE, CLIP, T5, "dev", "dev fp8"], [])
    assert layout(83).resident == [VAE, CLIP, T5, "dev", "dev fp8"]


def test_a_second_model_that_fits_comes_later() -> None:
    for card, later in ((83, []), (96, ["schnell"]), (140, ["schnell", "schnell fp8"])):
        assert (layout(card).resident, layout(card).later) == ([VAE, CLIP, T5, "dev", "dev fp8"], later)
        assert not {*layout(card).waiting, *layout(card).on_disk} & {*later}


def test_fp8_weights_stay_in_host_memory_where_they_will_have_to_leave_the_device_and_it_holds_them() -> None:
    assert layout(23).keeps_twins
    assert not layout(23, host=40).keeps_twins
    assert not layout(140).keeps_twins  # where everything fits


def test_what_a_small_host_cannot_keep_is_read_from_the_disk() -> None:
    small = layout(14.5, host=32)
    assert (small.resident, small.waiting, small.on_disk) == ([VAE, "dev fp8"], [CLIP, T5], ["schnell fp8"])
    assert layout(80, host=16).on_disk == ["schnell", "schnell fp8"]


@pytest.mark.parametrize("card", [8, 9, 12])
def test_a_card_that_is_too_small_for_anything_is_told_what_it_takes(card: int) -> None:
    with pytest.raises(TooSmallError) as caught:
        layout(card)
    assert str(caught.value) == (
        f"The device has {card}.0 GB for models, but schnell fp8 and VAE with 0.8 GB to work in need 13.0 GB at once."
    )


def test_room_for_what_comes_next_is_kept_where_there_can_be_so_much() -> None:
    parts, there = {"a": 6, "b": 3, "c": 2}, ["b", "c"]
    assert plan_moves(parts, 12, there, ["a"], 1).evict == []
    assert plan_moves(parts, 12, there, ["a"], 1, room=3).evict == ["b"]
    assert plan_moves(parts, 12, there, ["a"], 1, room=7).evict == []  # there never is


def test_the_least_recently_used_idle_parts_leave_for_pristine_copies_if_that_is_enough() -> None:
    parts = {"a": 3, "b": 4}
    assert plan_room(parts, 5, ["a", "b"], 5) == []
    assert plan_room(parts, 1, ["a", "b"], 4) == ["a"]
    assert plan_room(parts, 1, ["a", "b"], 9) is None


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
