"""What every hub provides: which addresses it understands, and how the file that one of them names is found."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from urllib.parse import SplitResult

from fetch.network import Client
from fetch.remote import RemoteFile
from settings import Settings


@dataclass(frozen=True)
class Address:
    """An http(s) address that a person pasted, taken apart."""

    url: SplitResult
    host: str  # in lower case, without "www."
    parts: tuple[str, ...]  # of the path, percent-decoded; none is empty, "." or ".."
    query: Mapping[str, str]  # its names in lower case


@dataclass(frozen=True)
class Source(ABC):
    """What a reference names. The fields of each kind of source are what tells one from another."""

    @property
    @abstractmethod
    def label(self) -> str:
        """For people, without a secret."""

    @property
    @abstractmethod
    def immutable(self) -> bool:
        """Whether it leads to the same file for ever, so that a copy in the cache is as good as asking."""

    @abstractmethod
    def resolve(self, settings: Settings, client: Client) -> RemoteFile | Path | bytes:
        """The file that it leads to now: one to download, one on this disk, or its content. Raises `LoraError`."""

    def endpoint(self, settings: Settings) -> str | None:
        """The hub's address, which the operator trusts: it may be a private one."""
        return None

    @property
    def identity(self) -> tuple[object, ...]:
        """What tells it from others of its kind."""
        return tuple(getattr(self, field.name) for field in fields(self) if field.compare)

    @property
    def key(self) -> str:
        """Its name in the cache: a hash, so that nothing of an address can be read there. A token in the address makes
        another key, since others may not be allowed to read what it opens."""
        return hashlib.sha256(repr((type(self).__name__, self.identity)).encode()).hexdigest()


@dataclass(frozen=True)
class Hub:
    """A place where LoRAs are published. To add one, write a module with its `Source` and list its `Hub` in
    `references.HUBS`."""

    hosts: tuple[str, ...]  # without "www."
    accepted: str  # the references that it takes, for people
    parse: Callable[[Address], Source | None]  # None for a page that is no LoRA's
