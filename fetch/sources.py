"""A reference to a LoRA becomes a verified file on this disk: resolved, downloaded, checked and stored.

    fetch_lora("fofr/flux-pixar-cars", settings).read(lambda fetched: fetched.path.read_bytes())

The work is done on a thread of its own, which holds the locks and the unfinished files: Cog's cancelling, which can
raise at any line of the request's thread, leaves nothing behind.
"""

import atexit
import hashlib
import logging
import re
import shutil
import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Literal, assert_never

from fetch import trigger_words
from fetch.cache import CacheEntry, LoraCache
from fetch.content import check_content
from fetch.downloads import download
from fetch.errors import CacheError, UnavailableError
from fetch.fetched import FetchedLora
from fetch.files import LARGEST_CONFIG, add_metadata, check_lora_file, extract_lora, is_tar
from fetch.hub import Source
from fetch.in_place import check_in_place
from fetch.limits import FetchLimits, too_large
from fetch.network import Cancellation, Client
from fetch.references import parse_reference
from fetch.remote import Downloaded, RemoteFile
from fetch.web import DataUri, FolderFile, LocalFile, WebFile
from lora.errors import LoraError
from lora.header import CONFIG_FILE
from service.threads import TimeLimitError, call_on_new_thread
from settings import MB, Settings

log = logging.getLogger("flux-lora")

DEFAULT_LIMITS = FetchLimits()
LICENCE = "modelspec.license"  # ModelSpec's entry for it (github.com/Stability-AI/ModelSpec)
PARTS = ("download", "config", "member", "with-config")  # the temporary files of one fetch


def fetch_lora(reference: str, settings: Settings, limits: FetchLimits = DEFAULT_LIMITS) -> FetchedLora:
    """The file that `reference` names, from the cache where that is as good as asking.

    Raises `LoraError`, one sentence for the person who asked.
    """
    return _fetch(parse_reference(reference), settings, limits)


def fetch_weights(weights: str, settings: Settings, limits: FetchLimits = DEFAULT_LIMITS) -> FetchedLora:
    """The LoRA that the operator gave with `COG_WEIGHTS`: a safetensors file, or a tar with one, here or at a URL.

    Unlike a request's, its URL may lead to a private host. Raises `LoraError`.
    """
    source = WebFile(weights) if re.match("https?://", weights) else LocalFile(weights)
    return _fetch(source, replace(settings, lora_allow_private_hosts=True), limits)


def _fetch(source: Source, settings: Settings, limits: FetchLimits) -> FetchedLora:
    fetch = _Fetch(source, settings, limits)
    known = fetch.cache.find(source.key)
    if known and source.immutable:
        return fetch.fetched(known, "disk")
    try:
        return _run(fetch)
    except CacheError as error:
        if known is None and not isinstance(source, DataUri):
            raise
        if known:
            log.warning("%s The copy in the LoRA cache is used.", error)
            return fetch.fetched(known, "disk")
        log.warning("%s %s is kept in a temporary folder.", error, source.label)
    return _run(_Fetch(source, replace(settings, lora_cache_dir=_spare_folder(), lora_cache_bytes=0), limits))


def clear_leftovers(settings: Settings) -> None:
    """Remove what killed processes left in the cache, where it can be written."""
    with suppress(OSError):
        LoraCache(settings.lora_cache_dir, settings.lora_cache_bytes).sweep()


@cache
def _spare_folder() -> Path:
    """Where a LoRA is kept that came with the request while the cache cannot be written."""
    folder = tempfile.mkdtemp(prefix="flux-lora-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _run(fetch: "_Fetch") -> FetchedLora:
    source, limits = fetch.source, fetch.limits
    try:
        return call_on_new_thread(fetch.run, limits.total_timeout, "lora")
    except TimeLimitError:
        late = UnavailableError(f"{source.label} did not arrive within {limits.total_timeout:g} seconds.")
        if (known := fetch.cache.find(source.key)) is None:
            raise late from None
        return fetch.use_copy(known, late)
    finally:
        fetch.cancellation.cancel()


class _Fetch:
    """One source on its way into the cache."""

    def __init__(self, source: Source, settings: Settings, limits: FetchLimits) -> None:
        self.source, self.settings, self.limits = source, settings, limits
        self.cache = LoraCache(settings.lora_cache_dir, settings.lora_cache_bytes)
        self.cancellation = Cancellation()

    def fetched(self, entry: CacheEntry, origin: Literal["disk", "download"]) -> FetchedLora:
        return FetchedLora(
            self.cache.path(entry.sha256),
            origin,
            self.source.label,
            entry.sha256,
            self._again,
        )

    def use_copy(self, known: CacheEntry, error: UnavailableError) -> FetchedLora:
        log.warning("%s The copy in the LoRA cache is used.", error)
        return self.fetched(known, "disk")

    def run(self) -> FetchedLora:
        """Bring it into the cache unless it is there or can be read where it lies. Raises `LoraError` and
        `FetchCancelledError`."""
        source, cache = self.source, self.cache
        if isinstance(source, FolderFile) and not _config_file(path := source.path(self.settings)).is_file():
            return self._where_it_lies(path)
        try:
            cache.prepare()
            with cache.lock(source.key, self.cancellation):
                known = cache.find(source.key)
                if known and source.immutable:  # another process has fetched it meanwhile
                    return self.fetched(known, "disk")
                try:
                    return self._resolve_and_store(known)
                except UnavailableError as error:
                    if known is None:
                        raise
                    return self.use_copy(known, error)
                finally:
                    for kind in PARTS:
                        self._part(kind).unlink(missing_ok=True)
        except OSError as error:
            raise CacheError(
                f"LORA_CACHE_DIR is {cache.folder}, which cannot be used: {error.strerror or error}."
            ) from None

    def _where_it_lies(self, path: Path) -> FetchedLora:
        label = self.source.label
        status, sha256 = check_in_place(path, label, self.settings.lora_max_bytes, self.cancellation)
        return FetchedLora(path, "disk", label, sha256, self._again, status)

    def _again(self) -> FetchedLora:
        return _fetch(self.source, self.settings, self.limits)

    def _part(self, kind: str) -> Path:
        return self.cache.part(self.source.key, kind)

    def _resolve_and_store(self, known: CacheEntry | None) -> FetchedLora:
        """Find out which file the source leads to now, and put that into the cache unless it is there."""
        source, settings = self.source, self.settings
        with Client(
            self.limits,
            self.cancellation,
            allow_private=settings.lora_allow_private_hosts,
            trusted=source.endpoint(settings),
        ) as client:
            match source.resolve(settings, client):
                case RemoteFile() as remote:
                    return self._download(client, remote, known)
                case Path() as path:
                    stored = self._store(self._copy(path), _config_beside(path))
                case bytes() as content:
                    stored = self._store(self._write(content))
                case unknown:
                    assert_never(unknown)
        return self.fetched(stored, "download")

    def _download(self, client: Client, remote: RemoteFile, known: CacheEntry | None) -> FetchedLora:
        started, label = time.monotonic(), self.source.label
        if remote.key is None:
            remote = replace(remote, headers=_if_changed(known))
        elif same := self.cache.find(remote.key):
            self.cache.link(self.source.key, same)
            return self.fetched(same, "disk")
        log.info("%s: fetching", label)
        downloaded = self._download_as_listed(client, remote)
        if downloaded is None:
            if known is None:
                raise LoraError(f"{label}: the server says that the file is unchanged, but there is no copy of it yet.")
            return self.fetched(known, "disk")
        config = None
        if remote.config_url:
            about = replace(remote, url=remote.config_url, sha256=None, size=None)
            download(client, about, self._part("config"), LARGEST_CONFIG, self.cache.make_room)
            config = self._part("config").read_bytes()
        stored = self._store(downloaded, config, remote.key, remote.trigger_words, remote.licence)
        log.info("%s: fetched %.1f MB in %.1f s", label, stored.size / MB, time.monotonic() - started)
        return self.fetched(stored, "download")

    def _download_as_listed(self, client: Client, remote: RemoteFile) -> Downloaded | None:
        """The file whose SHA-256 the hub lists; one that has another is fetched anew once."""
        part, most_bytes = self._part("download"), self.settings.lora_max_bytes
        unchecked, listed = replace(remote, sha256=None), (remote.sha256 or "").lower()
        for _ in range(2):
            downloaded = download(client, unchecked, part, most_bytes, self.cache.make_room)
            if downloaded is None or not listed or downloaded.sha256 == listed:
                return downloaded
            log.warning("%s: its SHA-256 is not the one that its hub lists", remote.label)
        raise LoraError(
            f"{remote.label} arrived twice, and its SHA-256 is another than its hub lists: the hub's entry is wrong or "
            f"its file was changed, so use another version or address."
        )

    def _copy(self, path: Path) -> Downloaded:
        part, most_bytes = self._part("download"), self.settings.lora_max_bytes
        try:
            size = path.stat().st_size
            if size > most_bytes:
                raise too_large(str(path), size, most_bytes)
            self.cache.make_room(size)
            shutil.copyfile(path, part)
            with part.open("rb") as file:
                return Downloaded(hashlib.file_digest(file, "sha256").hexdigest())
        except OSError as error:
            raise LoraError(f"{path} cannot be read: {error.strerror}.") from None

    def _write(self, content: bytes) -> Downloaded:
        part = self._part("download")
        self.cache.make_room(len(content))
        part.write_bytes(content)
        return Downloaded(hashlib.sha256(content).hexdigest())

    def _store(
        self,
        downloaded: Downloaded,
        config: bytes | None = None,
        other_key: str | None = None,
        words: tuple[str, ...] = (),
        licence: str | None = None,
    ) -> CacheEntry:
        """Unpack and check what was downloaded, and put it into the cache. PEFT's configuration, the trigger words and
        the licence go into the file's own metadata, so that a LoRA is one file."""
        label, part = self.source.label, self._part("download")
        if is_tar(part):
            member = self._part("member")
            sha256, config = extract_lora(part, member, label, self.settings.lora_max_bytes, self.cancellation)
            words = words or trigger_words.of_archive(part)
            part, downloaded = member, replace(downloaded, sha256=sha256)
        check_content(part, label)
        check_lora_file(part, label)
        metadata = {} if config is None else {CONFIG_FILE: config.decode(errors="replace")}
        metadata |= {trigger_words.ENTRY: ", ".join(words)} if words else {}
        metadata |= {LICENCE: licence} if licence else {}
        if metadata:
            complete = self._part("with-config")
            sha256 = add_metadata(part, complete, metadata, label, self.cancellation)
            part, downloaded = complete, replace(downloaded, sha256=sha256)
        self.cancellation.check()
        keys = [self.source.key, *([other_key] if other_key else [])]
        return self.cache.add(part, downloaded, *keys)


def _config_file(path: Path) -> Path:
    """Where PEFT's configuration of the adapter in a file would be."""
    return path.with_name(CONFIG_FILE)


def _config_beside(path: Path) -> bytes | None:
    beside = _config_file(path)
    return beside.read_bytes()[:LARGEST_CONFIG] if beside.is_file() else None


def _if_changed(known: CacheEntry | None) -> dict[str, str]:
    """RFC 9110, 13.1: a server that would send the same again answers 304 instead."""
    if known is None:
        return {}
    headers = {"If-None-Match": known.etag, "If-Modified-Since": known.last_modified}
    return {name: value for name, value in headers.items() if value}
