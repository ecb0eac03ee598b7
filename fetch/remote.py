"""A file on another machine: what is known of it beforehand, and what its server's answer means for a person."""

import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime

import requests

from fetch.errors import NotFoundError, UnavailableError
from fetch.network import host_of
from lora.errors import LoraError
from service.hugging_face import GATED

DAY = 86_400  # seconds


@dataclass(frozen=True)
class RemoteFile:
    """A file to download, and what is known of it beforehand."""

    label: str  # for people
    url: str
    token: str | None = field(default=None, repr=False)
    token_variable: str | None = None  # where a person would put a token
    headers: Mapping[str, str] = field(default_factory=dict)
    sha256: str | None = None
    size: int | None = None  # bytes
    key: str | None = None  # the cache's name of this very version of the file, which never changes
    config_url: str | None = None  # of PEFT's configuration beside it
    trigger_words: tuple[str, ...] = ()  # that its hub names
    licence: str | None = None  # as its hub has it


@dataclass(frozen=True)
class Downloaded:
    """A file that is on disk, and what its server would recognise it by (RFC 9110, 8.8)."""

    sha256: str
    etag: str | None = None
    last_modified: str | None = None


def check_answer(response: requests.Response, remote: RemoteFile) -> None:
    """Raises the `LoraError` that the answer's status or kind calls for; a file, or 304, passes."""
    status, host, label = response.status_code, host_of(response.url), remote.label
    if status in (408, 429) or status >= 500:
        seconds = _retry_after(response)
        wait = f"{seconds:.0f} seconds" if seconds <= DAY else "more than a day"
        later = f"; it asks to wait {wait}" if seconds else ""
        raise UnavailableError(f"{label}: {host} answers {status}{later}, try again later.", seconds)
    if response.headers.get("X-Error-Code") == "GatedRepo":
        raise LoraError(f"{label} {GATED}.")
    if status in (401, 403):
        raise LoraError(f"{label} is private or needs an account ({host} answers {status}){_token_hint(remote)}.")
    if status in (404, 410):
        private = f", or it is private{_token_hint(remote)}" if remote.token_variable else ""
        raise NotFoundError(f"{label} does not exist ({host} answers {status}){private}.")
    if status not in (200, 206, 304):
        raise LoraError(f"{label}: {host} answers {status} instead of a file.")
    if response.headers.get("Content-Type", "").lower().startswith("text/html"):
        raise LoraError(f"{label}: {host} sent a web page instead of a file{_token_hint(remote)}.")
    if response.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise LoraError(f"{label}: {host} sent the file compressed, though it was asked not to: use another address.")


def _token_hint(remote: RemoteFile) -> str:
    if not remote.token_variable:
        return ""
    if remote.token:
        return f"; the token of {remote.token_variable} or of the address does not open it"
    return f"; set {remote.token_variable} to a token that may read it"


def _retry_after(response: requests.Response) -> float:
    """Seconds, which the server gives as such or as a date (RFC 9110, 10.2.3); 0 when it does not say."""
    text = response.headers.get("Retry-After", "").strip()
    if re.fullmatch(r"[0-9]+", text):
        return float(text) if len(text) < 9 else math.inf
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0
