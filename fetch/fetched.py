"""A LoRA that was fetched, and how it is read although its file may go or change at any time."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

from fetch.in_place import Status, status_of
from lora.errors import LoraError

T = TypeVar("T")


@dataclass(frozen=True)
class FetchedLora:
    """A LoRA in the cache, from which it may be evicted at any time; who has opened it can still read it. Or one that
    lies elsewhere, where its owner may change it."""

    path: Path
    origin: Literal["disk", "download"]  # where it came from this time
    name: str  # for people
    sha256: str
    fetch_again: Callable[[], "FetchedLora"] = field(repr=False, compare=False)
    status: Status | None = field(default=None, repr=False, compare=False)  # of a file that is not the cache's

    def read(self, read: Callable[["FetchedLora"], T]) -> T:
        """What `read` makes of it. If it was evicted before `read` opened its path (`FileNotFoundError`), or its owner
        changed it meanwhile, it is fetched once more. Raises `LoraError` when that happens again."""
        fetched = self
        for last in (False, True):
            try:
                result = read(fetched)
                if fetched.status is None or status_of(fetched.path) == fetched.status:
                    return result
            except FileNotFoundError:
                pass
            if not last:
                fetched = self.fetch_again()
        if fetched.status:
            raise LoraError(f"{self.name} was changed while it was read: try again when it is complete.")
        raise LoraError(f"{self.name} was evicted from the cache before it was read: LORA_CACHE_GB is too small.")
