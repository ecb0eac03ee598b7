"""Hot-swap: whatever was merged, failed or was cancelled before, the weights are the checkpoint's with this set."""

import copy
import functools
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from flux import live as live_module
from flux.device import multiplies_bf16
from flux.live import LiveWeights
from flux.models import Flux, load_flux
from flux.pristine import Pristine
from lora import merge as merge_module
from lora.merge import Merge, merge
from lora.updates import Dora, Full, Hadamard, Kronecker, LowRank, Update
from tests.interrupts import CancelledError, interrupted_at

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn)
Set = tuple[tuple[str, float], ...]  # the LoRAs that are wanted and their strengths


@pytest.fixture(scope="module")
def flux(checkpoints: dict[str, Path]) -> Flux:
    """In bf16 on every machine: this is about weights, and nothing here multiplies in bf16."""
    return load_flux({"dev": checkpoints["dev"]}, torch.device("cpu"), torch.bfloat16)["dev"].exact


def some_updates(shapes: dict[str, torch.Size], seed: int, every: int) -> dict[str, Update]:
    """Updates of every kind, spread over some of the parameters, of the size that trained ones have."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, std: float = 0.1, mean: float = 0.0) -> Tensor:
        dtype = DTYPES[int(torch.randint(len(DTYPES), (), generator=generator))]
        return (mean + torch.randn(*shape, generator=generator) * std).to(dtype)

    updates: dict[str, Update] = {}
    for i, (name, shape) in enumerate(list(shapes.items())[seed % every :: every]):
        if len(shape) == 1:
            updates[name] = Full(random(*shape))
            continue
        rows, columns = shape
        low_rank = LowRank(random(rows, 3), random(3, columns), 0.5)
        kinds: list[Update] = [
            low_rank,
            LowRank(random(rows, 5), random(5, columns), 2.0),
            Kronecker((random(2, 2),), (random(rows // 2, 1), random(1, columns // 2)), 0.3),
            Hadamard(random(rows, 2), random(2, columns), random(rows, 2), random(2, columns), 1.0),
            Full(random(rows, columns, std=0.01)),
            Dora(low_rank, random(rows, 1, mean=1.0), (name,)),
            Dora(low_rank, random(1, columns, mean=1.0), (name,), eps=1e-6),
        ]
        updates[name] = kinds[i % len(kinds)]
    return updates


@pytest.fixture(scope="module")
def pristine(flux: Flux) -> Pristine:
    return flux.pristine("transformer")


@pytest.fixture(scope="module")
def loras(pristine: Pristine) -> dict[str, dict[str, Update]]:
    return {name: some_updates(pristine.shapes, seed, 3) for seed, name in enumerate("abc")}


def merges(loras: dict[str, Any], wanted: Set) -> dict[str, Merge]:
    found: dict[str, list[tuple[str, float, Update]]] = {}
    for sha256, strength in wanted:
        for name, update in loras[sha256].items():
            found.setdefault(name, []).append((sha256, strength, update))
    return {name: Merge(parts) for name, parts in found.items()}


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.named_parameters()}


@pytest.fixture(scope="module")
def fresh(flux: Flux, pristine: Pristine, loras: dict[str, Any]) -> Callable[[Set], dict[str, Tensor]]:
    """The weights that a process has whose first and only set this is."""
    untouched = copy.deepcopy(flux.transformer)

    @functools.cache
    def weights_of(wanted: Set) -> dict[str, Tensor]:
        live = LiveWeights(copy.deepcopy(untouched), pristine)
        live.apply(merges(loras, wanted))
        return weights(live.module)

    return weights_of


MODULES = (live_module, merge_module)

sets = st.lists(
    st.tuples(st.sampled_from("abc"), st.sampled_from([-1.0, 0.3, 1.0, 3.0])), max_size=2, unique_by=lambda one: one[0]
).map(tuple)
events = st.lists(st.tuples(sets, st.none() | st.integers(1, 4000)), min_size=1, max_size=8)


@settings(max_examples=25, deadline=None)
@given(events=events)
def test_weights_depend_on_nothing_that_was_before(
    flux: Flux, pristine: Pristine, loras: dict[str, Any], fresh: Callable[[Set], dict[str, Tensor]], events: Any
) -> None:
    """Sets applied, changed, unloaded, merges that break off at any line: each set is bit for bit a fresh one."""
    live = LiveWeights(flux.transformer, pristine)
    pointers = {name: value.data_ptr() for name, value in flux.transformer.named_parameters()}
    for wanted, interrupted in [*events, ((), None)]:
        if interrupted:
            try:
                with interrupted_at(interrupted, MODULES):
                    live.apply(merges(loras, wanted))
            except CancelledError:
                continue
        else:
            live.apply(merges(loras, wanted))
        expected = fresh(tuple(sorted(wanted)))
        for name, value in flux.transformer.named_parameters():
            assert torch.equal(value, expected[name]), name
            assert value.data_ptr() == pointers[name]  # in place: compiled graphs stay valid
        assert live.apply(merges(loras, wanted))[:2] == (0, 0)  # the same set again is free
    for name, value in flux.transformer.named_parameters():
        assert torch.equal(value, pristine(name))


@torch.no_grad()
def merge_into(
    live: Tensor, weight: Tensor, updates: list[tuple[float, Update]], *, bf16_products: bool | None = None
) -> None:
    """As `LiveWeights` calls it for the parameter 0.weight."""
    products = multiplies_bf16(live.device) if bf16_products is None else bf16_products
    rows = lambda start, some: live[start : start + len(some)].copy_(some)  # noqa: E731
    merge(updates, weight, {"0.weight": weight}, live, rows, bf16_products=products)


def test_a_merge_that_broke_off_is_known_to_have(flux: Flux, pristine: Pristine, loras: dict[str, Any]) -> None:
    """What was there before is asked for again: what is half written must not pass for it."""
    live = LiveWeights(flux.transformer, pristine)
    states = [merges(loras, wanted) for wanted in ((("a", 1.0),), (("a", 0.3), ("b", 1.0)), ())]
    for before, after in itertools.permutations(states, 2):
        live.apply(before)
        expected = weights(flux.transformer)
        for line in range(1, 60, 3):
            with pytest.raises(CancelledError), interrupted_at(line, [live_module], ("apply", "_change", "_restore")):
                live.apply(after)
            live.apply(before)
            assert all(torch.equal(value, expected[name]) for name, value in flux.transformer.named_parameters()), line
    live.apply({})


def exact_difference(update: Update, weight: Tensor) -> Tensor:
    """The formulas of the papers, in float64."""
    match update:
        case LowRank(up, down, scale):
            return scale * (up.double() @ down.double())
        case Kronecker(w1, w2, scale):
            first, second = (functools.reduce(torch.matmul, [one.double() for one in factors]) for factors in (w1, w2))
            return scale * torch.kron(first, second)
        case Hadamard(w1_a, w1_b, w2_a, w2_b, scale):
            return scale * (w1_a.double() @ w1_b.double()) * (w2_a.double() @ w2_b.double())
        case Full(value):
            return value.double()
        case Dora(inner, magnitude, eps=eps):
            new = weight + exact_difference(inner, weight)
            norm = new.norm(dim=1 if magnitude.shape[1] == 1 else 0, keepdim=True) + eps
            return magnitude.double() * new / norm - weight


def units_apart(a: Tensor, b: Tensor) -> Tensor:
    """How many bf16 numbers lie between two tensors of them."""
    first, second = (
        torch.where(bits < 0, -(bits & 0x7FFF), bits) for bits in (value.view(torch.int16).int() for value in (a, b))
    )
    return (first - second).abs()


@pytest.mark.parametrize("chunk", [1, 10_000, 2**30])
def test_merged_weights_are_the_float64_sum_rounded(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """Every kind, alone and two at once, whatever the rows are that are merged at a time."""
    monkeypatch.setattr(merge_module, "CHUNK", chunk)
    shape = torch.Size((192, 256))
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(shape, generator=generator) * 0.05).to(torch.bfloat16)
    layer = nn.Sequential(nn.Linear(shape[1], shape[0], bias=False, dtype=torch.bfloat16))
    names = [f"{i}.weight" for i in range(7)]
    every_kind = list(some_updates(dict.fromkeys(names, shape), 7, 1).values())
    equal = count = 0
    for first, second in zip(every_kind, [*every_kind[1:], None], strict=True):
        weighted = [(0.7, first)] + ([(-0.4, second)] if second else [])
        weighted = [(s, replace(u, fused=("0.weight",)) if isinstance(u, Dora) else u) for s, u in weighted]
        merge_into(layer[0].weight, weight, weighted)
        exact = weight.double() + sum(s * exact_difference(update, weight.double()) for s, update in weighted)
        apart = units_apart(layer[0].weight.detach(), exact.to(torch.bfloat16))
        assert apart.max() <= 1
        equal, count = equal + int((apart == 0).sum()), count + apart.numel()
    assert equal / count > 0.999


@pytest.mark.parametrize("strengths", [(0.7, 0.7), (0.7, -0.4)])
@pytest.mark.parametrize("has_instructions", [True, False])
def test_one_bf16_product_merges_as_precisely_as_float32(
    strengths: tuple[float, float], has_instructions: bool
) -> None:
    """With bf16 instructions and without, at one strength and at two, large differences too."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.1

    weight = random(192, 256).to(torch.bfloat16)
    layer = nn.Sequential(nn.Linear(256, 192, bias=False, dtype=torch.bfloat16))
    updates = [
        LowRank(random(192, 3).to(torch.bfloat16), random(3, 256).to(torch.bfloat16), 0.3),
        LowRank(random(192, 5).to(torch.float8_e4m3fn), random(5, 256).to(torch.bfloat16), 0.3),
    ]
    weighted = list(zip(strengths, updates, strict=True))
    merge_into(layer[0].weight, weight, weighted, bf16_products=has_instructions)
    exact = weight.double() + sum(s * exact_difference(update, weight.double()) for s, update in weighted)
    apart = units_apart(layer[0].weight.detach(), exact.to(torch.bfloat16))
    assert apart.max() <= 1
    assert (apart == 0).double().mean() > 0.999
