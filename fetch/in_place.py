"""A LoRA that is served from where the operator keeps it: hashed and checked once, and again when it was changed."""

import hashlib
import time
from pathlib import Path

from fetch.content import check_content
from fetch.files import BLOCK, check_lora_file
from fetch.limits import too_large
from fetch.network import Cancellation
from lora.errors import LoraError

MOST_KNOWN = 1000  # files whose hashes are remembered
SETTLED = 10**8  # nanoseconds after which another change has another time, on any file system

Status = tuple[int, int, int, int, int]  # what changes with a file: device, inode, bytes, modified, changed

_known: dict[Path, tuple[Status, str]] = {}  # a file -> what it was when it had this SHA-256


def status_of(path: Path) -> Status:
    """Raises `OSError`."""
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def check_in_place(path: Path, label: str, most_bytes: int, cancellation: Cancellation) -> tuple[Status, str]:
    """What the file is now, and its SHA-256. Raises `LoraError` unless it is a LoRA file, and `FetchCancelledError`."""
    try:
        status = status_of(path)
        known = _known.get(path)
        if known and known[0] == status:
            return known
        if status[2] > most_bytes:
            raise too_large(label, status[2], most_bytes)
        check_content(path, label)
        check_lora_file(path, label)
        found = status, _sha256(path, cancellation)
        if status_of(path) != status:
            raise LoraError(f"{label} was changed while it was read: try again when it is complete.")
    except OSError as error:
        raise LoraError(f"{label} cannot be read: {error.strerror}.") from None
    if time.time_ns() - max(status[3:]) > SETTLED:
        if len(_known) >= MOST_KNOWN:
            _known.clear()
        _known[path] = found
    return found


def _sha256(path: Path, cancellation: Cancellation) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            cancellation.check()
            digest.update(block)
    return digest.hexdigest()
