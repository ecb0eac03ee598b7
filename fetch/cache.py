"""LoRA files on disk, shared by every process that uses the folder.

`files/<sha256>.safetensors` are the LoRAs, named by their content and made visible by one rename each.
`refs/<key>.json` say which of them a reference led to; a key is a hash, so that no secret is in a name. `parts/` holds
what is arriving, under its key's lock in `locks/`. A LoRA may be evicted at any time; who has opened it can still read
it. Whatever a killed process leaves behind is either complete or not looked at, and the next `add` removes it.
"""

import hashlib
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from fetch.network import Stop, StoppedError
from fetch.remote import Arrived
from lora.errors import LoraError

log = logging.getLogger("flux-lora")

FOLDERS = ("files", "refs", "parts", "locks")
POLL_SECONDS = 0.02


@dataclass(frozen=True)
class Record:
    """What a reference led to, and how that file on disk looked when it was last known to be whole."""

    sha256: str
    size: int
    mtime_ns: int
    etag: str | None = None
    last_modified: str | None = None


class LoraCache:
    """The folder. `key` is always the hash that names a reference."""

    def __init__(self, folder: Path, most_bytes: int) -> None:
        self.folder, self._most_bytes = folder, most_bytes

    def prepare(self) -> None:
        """Make what is missing. Raises `LoraError` when that is not possible."""
        try:
            for name in FOLDERS:
                (self.folder / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LoraError(f"LORA_CACHE_DIR is {self.folder}, which cannot be used: {error.strerror}.") from None

    def path(self, sha256: str) -> Path:
        return self.folder / "files" / f"{sha256}.safetensors"

    def part(self, key: str, kind: str) -> Path:
        """Where what belongs to `key` may arrive, by whoever has its lock."""
        return self.folder / "parts" / f"{key}.{kind}"

    def find(self, key: str) -> Record | None:
        """What `key` led to, if that is here and whole; it counts as used now.

        A file that is as long and as old as when it was whole is whole; any other is hashed again.
        """
        try:
            record = Record(**json.loads(self._ref(key).read_bytes()))
            status = self.path(record.sha256).stat()
        except (OSError, ValueError, TypeError):
            return None
        if (status.st_size, status.st_mtime_ns) != (record.size, record.mtime_ns):
            return self._look_again(key, record)
        self._touch(record)
        return record

    def add(self, part: Path, arrived: Arrived, *keys: str) -> Record:
        """Make a finished part visible under `keys`, then evict the least recently used where there is too much."""
        with _locked(self._lock_file("cache")):
            path = self.path(arrived.sha256)
            part.replace(path)
            record = _record(path, arrived)
            for key in keys:
                self._link(key, record)
            self._evict(keep=path)
        return record

    def link(self, key: str, record: Record) -> None:
        """`key` leads to that file from now on."""
        with _locked(self._lock_file("cache")):
            self._link(key, record)

    def _link(self, key: str, record: Record) -> None:
        temporary = self.part(key, f"{os.getpid()}-{threading.get_ident()}.json")
        temporary.write_text(json.dumps(asdict(record)))
        temporary.replace(self._ref(key))

    @contextmanager
    def lock(self, key: str, stop: Stop) -> Iterator[None]:
        """One process at a time fetches `key`. Raises `StoppedError` when told to while it waits."""
        with _locked(self._lock_file(key[:3]), stop):  # shared by many keys, so that there are not ever more files
            yield

    def _lock_file(self, name: str) -> Path:
        return self.folder / "locks" / f"{name}.lock"

    def _ref(self, key: str) -> Path:
        return self.folder / "refs" / f"{key}.json"

    def _touch(self, record: Record) -> None:
        """The time of access says when it was used, whatever the file system does about it by itself."""
        with suppress(OSError):
            os.utime(self.path(record.sha256), ns=(time.time_ns(), record.mtime_ns))

    def _look_again(self, key: str, record: Record) -> Record | None:
        path = self.path(record.sha256)
        try:
            if _sha256(path) == record.sha256:
                fresh = _record(path, Arrived(record.sha256, record.etag, record.last_modified))
                with suppress(OSError):  # in a folder that is read-only it is hashed each time
                    self.link(key, fresh)
                return fresh
            log.warning("%s in the LoRA cache is damaged and is fetched again", path.name)
        except OSError:
            pass
        return None  # the file itself stays until a good one takes its place: another may be there by now

    def _evict(self, keep: Path) -> None:
        """Under the cache's lock."""
        files = {path: path.stat() for path in (self.folder / "files").iterdir()}
        excess = sum(status.st_size for status in files.values()) - self._most_bytes
        for path in sorted(files, key=lambda path: files[path].st_atime_ns):
            if excess > 0 and path != keep:
                log.info("LoRA cache: %s is evicted, the least recently used", path.name)
                path.unlink(missing_ok=True)
                excess -= files[path].st_size
        self._sweep()

    def _sweep(self) -> None:
        """Remove what killed processes and older versions left, and the references to files that are gone."""
        shutil.rmtree(self.folder / "holds", ignore_errors=True)  # of versions that marked the files that they read
        for part in (self.folder / "parts").iterdir():
            with _try_lock(self._lock_file(part.name[:3])) as free:
                if free:
                    part.unlink(missing_ok=True)
        for ref in (self.folder / "refs").iterdir():
            try:
                gone = not self.path(json.loads(ref.read_bytes())["sha256"]).exists()
            except (OSError, ValueError, TypeError, KeyError):
                gone = True
            if gone:
                ref.unlink(missing_ok=True)


@contextmanager
def _locked(file: Path, stop: Stop | None = None) -> Iterator[None]:
    lock = FileLock(file)
    try:
        lock.acquire(poll_interval=POLL_SECONDS, cancel_check=stop.is_set if stop else None)
    except Timeout:
        raise StoppedError from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _try_lock(file: Path) -> Iterator[bool]:
    """Whether nobody has the lock; it is ours in the body then."""
    lock = FileLock(file)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def _record(path: Path, arrived: Arrived) -> Record:
    status = path.stat()
    return Record(arrived.sha256, status.st_size, status.st_mtime_ns, arrived.etag, arrived.last_modified)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
