"""A file on another machine: what is known of it beforehand, and what its server's answer means for a person."""

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path

import requests

from fetch.network import RetryError, host_of
from fetch.references import Source
from lora.errors import LoraError
from settings import GB


@dataclass(frozen=True)
class Remote:
    """A file to fetch, and what is known of it beforehand."""

    label: str  # for people
    url: str
    token: str | None = field(default=None, repr=False)
    token_variable: str | None = None  # where a person would put a token
    headers: Mapping[str, str] = field(default_factory=dict)
    sha256: str | None = None
    size: int | None = None
    identity: Source | None = None  # an immutable name of this very file
    config: str | None = None  # the address of PEFT's configuration beside it


@dataclass(frozen=True)
class Arrived:
    """A file that is on disk, and how its server would recognise it."""

    sha256: str
    etag: str | None = None
    last_modified: str | None = None


class NotThereError(LoraError):
    """The server knows no such thing, or does not say that it does."""


def check_answer(response: requests.Response, remote: Remote) -> None:
    """Raises the `LoraError` that the answer's status or kind calls for; a file, or 304, passes."""
    status, host, label = response.status_code, host_of(response.url), remote.label
    if status in (408, 429) or status >= 500:
        wait = _retry_after(response)
        later = f"; it asks to wait {wait:.0f} seconds" if wait else ""
        raise RetryError(f"{label}: {host} answers {status}{later}, try again later.", wait)
    if response.headers.get("X-Error-Code") == "GatedRepo":
        raise LoraError(
            f"{label} is gated: accept its licence on its page and set HF_TOKEN to a token of that account."
        )
    if status in (401, 403):
        raise LoraError(f"{label} is private or needs an account ({host} answers {status}){_token_hint(remote)}.")
    if status in (404, 410):
        private = f", or it is private{_token_hint(remote)}" if remote.token_variable else ""
        raise NotThereError(f"{label} does not exist ({host} answers {status}){private}.")
    if status not in (200, 206, 304):
        raise LoraError(f"{label}: {host} answers {status} instead of a file.")
    if response.headers.get("Content-Type", "").lower().startswith("text/html"):
        raise LoraError(f"{label}: {host} sent a web page instead of a file{_token_hint(remote)}.")
    if response.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise LoraError(f"{label}: {host} sent the file compressed, though it was asked not to: use another address.")


def too_large(label: str, size: int | None, most_bytes: int) -> LoraError:
    has = f"has {size / GB:.3g} GB" if size else "does not end in time"
    return LoraError(f"{label} {has}; LORA_MAX_GB allows {most_bytes / GB:.3g} GB, and LoRAs are smaller than models.")


def check_space(path: Path, size: int) -> None:
    """Raises `LoraError` when the disk has no room for `size` more bytes."""
    free = shutil.disk_usage(path.parent).free
    if size > free:
        raise LoraError(f"The disk of LORA_CACHE_DIR has {free / GB:.3g} GB free and {size / GB:.3g} GB are needed.")


def _token_hint(remote: Remote) -> str:
    if not remote.token_variable:
        return ""
    if remote.token:
        return f"; the token of {remote.token_variable} or of the address does not open it"
    return f"; set {remote.token_variable} to a token that may read it"


def _retry_after(response: requests.Response) -> float:
    """RFC 9110, 10.2.3: seconds or a date."""
    text = response.headers.get("Retry-After", "").strip()
    if text.isdecimal():
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return 0.0
