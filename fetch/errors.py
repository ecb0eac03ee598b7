"""The errors of fetching that are told apart. All others are plain `LoraError`s."""

from lora.errors import LoraError


class UnavailableError(LoraError):
    """The server cannot be reached or does not deliver now; a copy in the cache may serve.

    `retry_after` says in how many seconds another try may succeed; None: another try is of no use.
    """

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class NotFoundError(LoraError):
    """The server has no such thing, or does not say that it has."""


class CacheError(LoraError):
    """The cache's folder cannot be written: it is read-only or full, or another user's."""


class FetchCancelledError(Exception):
    """The fetch is not wanted any more."""
