"""LoRA files on disk, shared by every process that uses the folder.

`files/<sha256>.safetensors` are the LoRAs, named by their content and made visible by one rename each.
`refs/<key>.json` say which of them a reference led to; a key is a hash, so that no secret is in a name. `parts/` holds
what is arriving, under its key's lock in `locks/`. A LoRA may be evicted at any time; who has opened it can still read
it. Whatever a killed process leaves behind is either complete or not looked at, and the next start, or the next `add`,
removes it.
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

from fetch.errors import FetchCancelledError
from fetch.limits import check_space
from fetch.network import Cancellation
from fetch.remote import Downloaded

log = logging.getLogger("flux-lora")

FOLDERS = ("files", "refs", "parts", "locks")
POLL_SECONDS = 0.02


@dataclass(frozen=True)
class CacheEntry:
    """The file that a reference led to, and its size and time when it was last known to be intact."""

    sha256: str
    size: int
    mtime_ns: int
    etag: str | None = None
    last_modified: str | None = None


class LoraCache:
    """The folder. A `key` is the hash that names a reference (`Source.key`)."""

    def __init__(self, folder: Path, most_bytes: int) -> None:
        self.folder, self._most_bytes = folder, most_bytes

    def prepare(self) -> None:
        """Make the folders that are missing. Raises `OSError` when that is not possible."""
        for name in FOLDERS:
            (self.folder / name).mkdir(parents=True, exist_ok=True)

    def make_room(self, size: int) -> None:
        """Evict until the disk has room for `size` more bytes. Raises `CacheError`, and evicts nothing, when that would
        not do."""
        kept = sum(path.stat().st_size for path in (self.folder / "files").iterdir())
        if 0 < self._missing(size) <= kept:
            with _locked(self._lock_file("cache")):
                self._evict(size)
        check_space(self.folder / "files", size)

    def _missing(self, size: int) -> int:
        """How many bytes too few the disk has for `size` more."""
        return size - shutil.disk_usage(self.folder).free

    def path(self, sha256: str) -> Path:
        return self.folder / "files" / f"{sha256}.safetensors"

    def part(self, key: str, kind: str) -> Path:
        """A temporary file for what belongs to `key`. Only who has its lock may use it."""
        return self.folder / "parts" / f"{key}.{kind}"

    def find(self, key: str) -> CacheEntry | None:
        """What `key` led to, if that is here and intact. It counts as used now.

        A file whose size and time are those of the entry is intact; any other is hashed again.
        """
        try:
            entry = CacheEntry(**json.loads(self._ref(key).read_bytes()))
            status = self.path(entry.sha256).stat()
        except (OSError, ValueError, TypeError):
            return None
        if (status.st_size, status.st_mtime_ns) != (entry.size, entry.mtime_ns):
            return self._rehash(key, entry)
        self._touch(entry)
        return entry

    def add(self, part: Path, downloaded: Downloaded, *keys: str) -> CacheEntry:
        """Make a finished part visible under `keys`, then evict the least recently used where there is too much."""
        with _locked(self._lock_file("cache")):
            path = self.path(downloaded.sha256)
            part.replace(path)
            entry = _entry(path, downloaded)
            for key in keys:
                self._link(key, entry)
            self._evict(0, keep=path)
        return entry

    def link(self, key: str, entry: CacheEntry) -> None:
        """Let `key` lead to that file from now on."""
        with _locked(self._lock_file("cache")):
            self._link(key, entry)

    def _link(self, key: str, entry: CacheEntry) -> None:
        temporary = self.part(key, f"{os.getpid()}-{threading.get_ident()}.json")
        temporary.write_text(json.dumps(asdict(entry)))
        temporary.replace(self._ref(key))

    @contextmanager
    def lock(self, key: str, cancellation: Cancellation) -> Iterator[None]:
        """Only one thread of all processes may fetch `key` at a time. Raises `FetchCancelledError`."""
        with _locked(self._lock_file(key[:3]), cancellation):  # many keys share a file, so that their number is bounded
            yield

    def _lock_file(self, name: str) -> Path:
        return self.folder / "locks" / f"{name}.lock"

    def _ref(self, key: str) -> Path:
        return self.folder / "refs" / f"{key}.json"

    def _touch(self, entry: CacheEntry) -> None:
        """Set the time of access, which says when it was used last: a file system may not do so by itself."""
        with suppress(OSError):
            os.utime(self.path(entry.sha256), ns=(time.time_ns(), entry.mtime_ns))

    def _rehash(self, key: str, entry: CacheEntry) -> CacheEntry | None:
        path = self.path(entry.sha256)
        try:
            if _sha256(path) == entry.sha256:
                fresh = _entry(path, Downloaded(entry.sha256, entry.etag, entry.last_modified))
                with suppress(OSError):  # in a folder that is read-only it is hashed each time
                    self.link(key, fresh)
                return fresh
            log.warning("%s in the LoRA cache is damaged and is fetched again", path.name)
        except OSError:
            pass
        return None  # the file stays until a good one replaces it, which may have happened already

    def _evict(self, size: int, keep: Path | None = None) -> None:
        """Remove the least recently used files, until the cache is within its size and the disk has room for `size`
        more bytes. Call it under the cache's lock."""
        files = {path: path.stat() for path in (self.folder / "files").iterdir()}
        excess = sum(status.st_size for status in files.values()) - self._most_bytes
        excess = max(excess, self._missing(size))
        for path in sorted(files, key=lambda path: files[path].st_atime_ns):
            if excess > 0 and path != keep:
                log.info("LoRA cache: %s is evicted, the least recently used", path.name)
                path.unlink(missing_ok=True)
                excess -= files[path].st_size
        self._sweep()

    def sweep(self) -> None:
        """Remove what killed processes and older versions left, unless another process is at it. Raises `OSError` when
        the folder cannot be written."""
        if not self.folder.is_dir():
            return
        with _try_lock(self._lock_file("cache")) as free:
            if free:
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
def _locked(file: Path, cancellation: Cancellation | None = None) -> Iterator[None]:
    lock = FileLock(file)
    try:
        lock.acquire(poll_interval=POLL_SECONDS, cancel_check=cancellation.is_cancelled if cancellation else None)
    except Timeout:
        raise FetchCancelledError from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _try_lock(file: Path) -> Iterator[bool]:
    """Whether nobody had the lock; then the body has it."""
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


def _entry(path: Path, downloaded: Downloaded) -> CacheEntry:
    status = path.stat()
    return CacheEntry(downloaded.sha256, status.st_size, status.st_mtime_ns, downloaded.etag, downloaded.last_modified)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
