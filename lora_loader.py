"""Which LoRAs are in the models now, and how the ones that a request names get there: fetched, read, merged."""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias, get_args

from fetch.fetched import FetchedLora
from fetch.sources import clear_leftovers, fetch_lora, fetch_weights
from flux.models import Flux, Models, residency_of
from flux.pipelines import NotFiniteError
from lora.about import describe
from lora.errors import LoraError
from lora.formats import Adapter, read_lora
from lora.header import read_header
from lora.merge import Merge
from lora.names import CLIP, T5, TRANSFORMER, Shapes
from lora.updates import Update, rank_of
from phases import Phases
from settings import MB, Settings

log = logging.getLogger("flux-lora")

TEXT_ENCODERS = (CLIP, T5)
COMPONENTS = (TRANSFORMER, *TEXT_ENCODERS)  # what a LoRA may change

Origin: TypeAlias = Literal["download", "disk", "memory"]
ORIGINS = get_args(Origin)  # the slowest first
Request: TypeAlias = tuple[str | None, float]  # a reference and its strength


@dataclass(frozen=True)
class Lora:
    """A LoRA in memory, read for one of the models."""

    sha256: str
    adapter: Adapter
    trigger_words: tuple[str, ...] = ()

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
    name: str  # for people, as this request called it


class LoraLoader:
    """Fetches, reads and remembers LoRAs, and keeps the models' weights at what each request asks for."""

    def __init__(self, models: Models, settings: Settings) -> None:
        self.settings = settings
        self.models = models
        self.residency = residency_of(models)
        # Read LoRAs by (sha256, model), the least recently used first. A plain dict, since every single step on it is
        # atomic: Cog's cancelling, which can raise between any two lines, leaves it intact.
        self._memory: dict[tuple[str, str], Lora] = {}
        self._own: FetchedLora | None = None
        self.residency.when_host_is_full = lambda: self._forget_least_recently_used(0)
        clear_leftovers(settings)

    def load_own(self, weights: str) -> None:
        """Fetch a fine-tune's own LoRA, which stands in wherever a request names no main one, and merge it into the
        first model. Raises `LoraError`."""
        self._own = fetch_weights(weights, self.settings)
        model, precisions = next(iter(self.models.items()))
        self.apply(precisions.exact, [self._active(model, self._own, 1.0)])

    def load(self, model: str, main: Request, extra: Request, phases: Phases) -> list[ActiveLora]:
        """The LoRAs of one request, fetched and read for `model`, at their strengths. Counts the phases "lora_fetch"
        (asking, waiting for another process that fetches the same file, downloading) and "lora_read".

        A reference of None or without text names none; for the main one that is the fine-tune's own where there is one.
        Raises `LoraError`.
        """
        active = []
        for (reference, strength), own in ((main, self._own), (extra, None)):
            named = reference if reference and reference.strip() else None
            with phases.time("lora_fetch"):
                fetched = fetch_lora(named, self.settings) if named else own
            if fetched:
                with phases.time("lora_read"):
                    active.append(self._active(model, fetched, strength))
        return active

    def _active(self, model: str, fetched: FetchedLora, strength: float) -> ActiveLora:
        key = (fetched.sha256, model)
        if key in self._memory:
            lora = self._memory.pop(key)
            self._memory[key] = lora
            return ActiveLora(lora, strength, "memory", fetched.name)

        def read(fetched: FetchedLora) -> ActiveLora:
            adapter = read_lora(fetched.path, self._shapes(model), fetched.name)
            words = describe(read_header(fetched.path, fetched.name)).trigger_words
            return ActiveLora(Lora(fetched.sha256, adapter, words), strength, fetched.origin, fetched.name)

        active = fetched.read(read)
        self._memory[active.lora.sha256, model] = active.lora
        self._forget_least_recently_used(self.settings.lora_ram_bytes)
        return active

    def _forget_least_recently_used(self, most_bytes: int) -> None:
        """Keep within so many bytes. The fine-tune's own LoRA stays: its address may not be good for ever."""
        own = self._own.sha256 if self._own else None
        for key in [key for key in self._memory if key[0] != own]:
            if sum(kept.nbytes for kept in self._memory.values()) <= most_bytes:
                return
            del self._memory[key]

    def _shapes(self, model: str) -> Shapes:
        return {component: self.models[model].exact.pristine(component).shapes for component in COMPONENTS}

    def apply(self, flux: Flux, loras: Sequence[ActiveLora]) -> tuple[tuple[str, float], ...]:
        """Let the weights of `flux` be those of the checkpoint with `loras` merged in, now or when they come to the
        device.

        Returns what the text encoders' weights now are, for whoever keeps what they made.
        """
        started, merged, restored = time.perf_counter(), 0, 0
        loras = [active for active in loras if active.strength != 0]
        for component in COMPONENTS:
            written = self.residency.change(getattr(flux, component), merges(loras, component))
            merged, restored = merged + written.changed, restored + written.restored
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


def merges(loras: Sequence[ActiveLora], component: str) -> dict[str, Merge]:
    """What the LoRAs make of each parameter of a component that they change."""
    parts: dict[str, list[tuple[str, float, Update]]] = {}
    for active in loras:
        for name, update in active.lora.adapter.updates.get(component, {}).items():
            parts.setdefault(name, []).append((active.lora.sha256, active.strength, update))
    return {name: Merge(of_one) for name, of_one in parts.items()}


def trigger_words(loras: Sequence[ActiveLora]) -> list[str]:
    """Those of all LoRAs that change anything, each once."""
    return list(dict.fromkeys(word for active in loras if active.strength != 0 for word in active.lora.trigger_words))


def slowest_origin(loras: Sequence[ActiveLora]) -> str:
    """For the metrics: where the one came from that took longest to come."""
    origins = {active.origin for active in loras}
    return next((origin for origin in ORIGINS if origin in origins), "none")


@contextmanager
def blamed_on(loras: Sequence[ActiveLora]) -> Iterator[None]:
    """Within, a picture that is not finite is the LoRAs' fault, where there are any. Raises `LoraError`."""
    try:
        yield
    except NotFiniteError:
        used = [f"{active.name} at strength {active.strength:g}" for active in loras if active.strength != 0]
        if not used:
            raise
        raise LoraError(
            f"With {' and '.join(used)} the picture's numbers are not finite: use a lower strength or another LoRA."
        ) from None


def _describe(active: ActiveLora) -> str:
    """One line for the log: what it is, where it came from and what it changes."""
    adapter = active.lora.adapter
    updates = [update for changed in adapter.updates.values() for update in changed.values()]
    ranks = sorted({rank for rank in map(rank_of, updates) if rank is not None})
    rank = f", rank {ranks[0]}" + (f" to {ranks[-1]}" if len(ranks) > 1 else "") if ranks else ""
    counts = ", ".join(f"{len(changed)} of {component}" for component, changed in adapter.updates.items() if changed)
    return (
        f"{active.name} at {active.strength:g} (from {active.origin}): {adapter.dialect}{rank}, "
        f"{active.lora.nbytes / MB:.1f} MB, changes {counts}"
    )
