"""Which LoRAs are in the models now, and how the ones that a request names get there.

A live weight is computed from the pristine one in one pass, for all LoRAs at once:
W_live = round(W + sum of strength * difference), summed in float32, rounded once, written in place. Nothing is ever
subtracted: a weight that no LoRA touches any more is copied from the checkpoint. So the weights are a function of the
checkpoint and of the LoRAs with their strengths, and of nothing that was before.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from fetch.sources import FetchedLora, fetch_lora, fetch_weights, in_use
from flux.device import multiplies_bf16
from flux.models import Flux
from flux.pristine import Pristine
from lora.formats import Adapter, read_lora
from lora.names import CLIP, T5, TRANSFORMER
from lora.updates import Base, LowRank, Update, rank_of
from settings import MB, Settings

log = logging.getLogger("flux-lora")

TEXT_ENCODERS = (CLIP, T5)
COMPONENTS = (TRANSFORMER, *TEXT_ENCODERS)  # what a LoRA may change
CHUNK = 3 * 2**18  # float32 numbers that a CPU merges at a time: few enough to stay in its cache

Origin: TypeAlias = Literal["download", "disk", "memory"]
ORIGINS = get_args(Origin)  # the slowest first
Named: TypeAlias = tuple[str | None, float]  # a reference and its strength
Content: TypeAlias = tuple[tuple[str, float], ...]  # the LoRAs in a weight: (sha256, strength), sorted
Wanted: TypeAlias = Mapping[str, Sequence[tuple[str, float, Update]]]  # parameter -> sha256, strength, update
PRISTINE: Content = ()


@dataclass(frozen=True)
class Lora:
    """A LoRA in memory, read for one of the models."""

    name: str  # for people
    sha256: str
    adapter: Adapter

    @cached_property
    def nbytes(self) -> int:
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for updates in self.adapter.updates.values()
            for update in updates.values()
            for tensor in update.tensors()
        }
        return sum(storages.values())


@dataclass(frozen=True)
class ActiveLora:
    """A LoRA at the strength that a request asks for."""

    lora: Lora
    strength: float
    origin: Origin


class LiveWeights:
    """The weights of one loaded part (a transformer or a text encoder) and what is in each of them.

    A weight's entry says which LoRAs it holds. It is marked unknown before the first byte is written and known after
    the last, so that whatever interrupts a merge, the next `apply` writes that weight again.
    """

    def __init__(self, module: nn.Module, pristine: Pristine) -> None:
        self.module = module
        self.pristine = pristine
        self.contents: dict[str, Content | None] = {}  # of what may differ from the checkpoint; None: unknown
        self.wanted: Wanted = {}  # what they shall hold, for when the module is not on the device

    @torch.no_grad()
    def apply(self, wanted: Wanted) -> tuple[int, int]:
        """Let the weights be those of the checkpoint with `wanted` (parameter -> sha256, strength, update) and nothing
        else. Returns how many were merged and how many restored; what is as it should be is not touched."""
        merged = restored = 0
        for name in list(self.contents.keys() | wanted.keys()):
            # the order of float32 sums must not depend on which input named which LoRA
            parts = sorted(wanted.get(name, ()), key=lambda part: part[:2])
            content = tuple((sha256, strength) for sha256, strength, _ in parts)
            if self.contents.get(name, PRISTINE) == content:
                continue
            self.contents[name] = None
            write_weight(self.module, name, self.pristine, [(strength, update) for _, strength, update in parts])
            if content == PRISTINE:
                del self.contents[name]
                restored += 1
            else:
                self.contents[name] = content
                merged += 1
        return merged, restored


def write_weight(module: nn.Module, name: str, pristine: Base, updates: Sequence[tuple[float, Update]]) -> None:
    """Write pristine + sum of strength * difference into the module's parameter `name`, in place.

    Low-rank updates are one matrix product for all of them. Where everything is bf16, it adds and rounds too;
    otherwise a chunk of rows at a time is summed in float32. Other updates are computed whole.
    """
    owner = module.get_submodule(name.rpartition(".")[0])
    live = getattr(owner, name.rpartition(".")[2])
    weight = pristine(name)
    if not updates:
        _write_rows(owner, live, 0, weight)
        return

    def base(other: str) -> Tensor:
        return pristine(other).to(live.device)

    updates = [(strength, update.to(live.device)) for strength, update in updates]
    low_rank = [(strength, update) for strength, update in updates if isinstance(update, LowRank)]
    others = [(strength, update.difference(base)) for strength, update in updates if not isinstance(update, LowRank)]
    if not others and weight.dtype == live.dtype == torch.bfloat16 and multiplies_bf16(live.device):
        scale, up, down = _bf16_factors(low_rank)
        # its sums are float32, this one too: bf16 is only what it reads and what it rounds to in the end
        torch.addmm(weight.to(live.device), up, down, alpha=scale, out=live)
        return
    if low_rank:
        up = torch.cat([(strength * update.scale) * update.up.float() for strength, update in low_rank], dim=1)
        down = torch.cat([update.down.float() for _, update in low_rank])
    rows = len(weight) if live.device.type == "cuda" else max(1, CHUNK * len(weight) // weight.numel())
    for start in range(0, len(weight), rows):
        chunk = slice(start, start + rows)
        total = weight[chunk].to(live.device, torch.float32, copy=True)
        for strength, difference in others:
            total.add_(difference[chunk], alpha=strength)
        if low_rank:
            total.addmm_(up[chunk], down)
        _write_rows(owner, live, start, total)


def _bf16_factors(updates: Sequence[tuple[float, LowRank]]) -> tuple[float, Tensor, Tensor]:
    """A scale and two bf16 matrices whose product is the sum of strength * difference, as precise as in float32.

    The largest scale is taken out, so that bf16 factors with that scale go in as they are. Others are sums of bf16
    matrices, and their product that of all pairs but those below float32's precision.
    """
    scales = [strength * update.scale for strength, update in updates]
    largest = max(scales, key=abs) or 1.0
    ups, downs = [], []
    for scale, (_, update) in zip(scales, updates, strict=True):
        terms = _bf16_terms(update.down.float())
        for i, up in enumerate(_bf16_terms(update.up.float() * (scale / largest))):
            for down in terms[: 3 - i]:
                ups.append(up)
                downs.append(down)
    return largest, torch.cat(ups, dim=1), torch.cat(downs)


def _bf16_terms(factor: Tensor) -> list[Tensor]:
    """Bf16 matrices, as few as it takes, whose sum is the float32 one: three times 8 bits are its 24."""
    terms: list[Tensor] = []
    while len(terms) < 3 and (not terms or factor.any()):
        terms.append(factor.to(torch.bfloat16))
        factor = factor - terms[-1]
    return terms


def _write_rows(owner: nn.Module, live: Tensor, start: int, rows: Tensor) -> None:
    """Write rows from `start` on; a quantized layer quantizes them by itself."""
    quantize_rows = getattr(owner, "quantize_rows_", None)
    if quantize_rows is not None and live.ndim == 2:
        quantize_rows(start, rows)
    else:
        live[start : start + len(rows)].copy_(rows)


class LoraLoader:
    """Fetches, reads and remembers LoRAs, and keeps the models' weights at what each request asks for."""

    def __init__(self, models: Mapping[str, Flux], settings: Settings) -> None:
        self.settings = settings
        self.models = models
        self.residency = next(iter(models.values())).residency
        self.residency.listeners.append(self)
        self._live: dict[nn.Module, LiveWeights] = {}  # of every part that is or was in use
        # Read LoRAs by (sha256, model), the least recently used first. A plain dict, since every single step on it is
        # atomic: Cog's cancelling, which can raise between any two lines, leaves it whole.
        self._memory: dict[tuple[str, str], Lora] = {}
        self._own: FetchedLora | None = None
        self._holds = ExitStack()

    def load_own(self, weights: str) -> None:
        """Fetch a fine-tune's own LoRA, which stands in wherever a request names no main one, and merge it into the
        first model. Raises `LoraError`."""
        self._own = fetch_weights(weights, self.settings)
        self._holds.enter_context(in_use(self._own))
        model, flux = next(iter(self.models.items()))
        self.apply(flux, [self._active(model, self._own, 1.0)])

    def load(self, model: str, main: Named, extra: Named) -> list[ActiveLora]:
        """The LoRAs of one request, fetched and read for `model`, at their strengths.

        A reference of None or without text names none; for the main one that is the fine-tune's own where there is one.
        Raises `LoraError`.
        """
        active = []
        for (reference, strength), own in ((main, self._own), (extra, None)):
            if reference and reference.strip():
                active.append(self._active(model, fetch_lora(reference, self.settings), strength))
            elif own:
                active.append(self._active(model, own, strength))
        return active

    def _active(self, model: str, fetched: FetchedLora, strength: float) -> ActiveLora:
        key = (fetched.sha256, model)
        if key in self._memory:
            lora = self._memory.pop(key)
            self._memory[key] = lora
            return ActiveLora(lora, strength, "memory")
        with in_use(fetched) as path:
            lora = Lora(fetched.name, fetched.sha256, read_lora(path, self._shapes(model), fetched.name))
        self._memory[key] = lora
        while sum(kept.nbytes for kept in self._memory.values()) > self.settings.lora_ram_bytes:
            del self._memory[next(iter(self._memory))]
        return ActiveLora(lora, strength, fetched.cache)

    def _shapes(self, model: str) -> dict[str, dict[str, torch.Size]]:
        return {component: self.models[model].pristine[component].shapes for component in COMPONENTS}

    def before_load(self, module: nn.Module) -> None:
        """A part is about to come to the device as the checkpoint has it."""
        if module in self._live:
            self._live[module].contents.clear()

    def after_load(self, module: nn.Module) -> None:
        """A part has come: give it the LoRAs that were asked for while it was away."""
        if module in self._live:
            self._live[module].apply(self._live[module].wanted)

    def apply(self, flux: Flux, loras: Sequence[ActiveLora]) -> Content:
        """Let the weights of `flux` be those of the checkpoint with `loras` merged in, now or when they come to the
        device.

        Returns what the text encoders' weights now are, for whoever keeps what they made.
        """
        started, merged, restored = time.perf_counter(), 0, 0
        loras = [active for active in loras if active.strength != 0]
        for component in COMPONENTS:
            module = getattr(flux.txt2img, component)
            live = self._live.setdefault(module, LiveWeights(module, flux.pristine[component]))
            wanted: dict[str, list[tuple[str, float, Update]]] = {}
            for active in loras:
                for name, update in active.lora.adapter.updates.get(component, {}).items():
                    wanted.setdefault(name, []).append((active.lora.sha256, active.strength, update))
            live.wanted = wanted
            if self.residency.has(module):
                counts = live.apply(wanted)
                merged, restored = merged + counts[0], restored + counts[1]
        for active in loras:
            log.info("%s", _describe(active))
        if merged or restored:
            log.info("LoRAs: %d weights merged, %d restored in %.3f s", merged, restored, time.perf_counter() - started)
        return tuple(
            sorted(
                (active.lora.sha256, active.strength)
                for active in loras
                if any(active.lora.adapter.updates.get(component) for component in TEXT_ENCODERS)
            )
        )


def slowest_origin(loras: Sequence[ActiveLora]) -> str:
    """For the metrics: where the one came from that took longest to come."""
    origins = {active.origin for active in loras}
    return next((origin for origin in ORIGINS if origin in origins), "none")


def _describe(active: ActiveLora) -> str:
    """One line for the log: what it is, where it came from and what it changes."""
    adapter = active.lora.adapter
    updates = [update for changed in adapter.updates.values() for update in changed.values()]
    ranks = sorted({rank for rank in map(rank_of, updates) if rank is not None})
    rank = f", rank {ranks[0]}" + (f" to {ranks[-1]}" if len(ranks) > 1 else "") if ranks else ""
    counts = ", ".join(f"{len(changed)} of {component}" for component, changed in adapter.updates.items() if changed)
    return (
        f"{active.lora.name} at {active.strength:g} (from {active.origin}): {adapter.dialect}{rank}, "
        f"{active.lora.nbytes / MB:.1f} MB, changes {counts}"
    )
