"""A reference to a LoRA becomes a verified file on this disk: asked for, fetched, checked and kept.

    fetch_lora("fofr/flux-pixar-cars", settings).read(lambda fetched: fetched.path.read_bytes())

The work is done by threads that hold the locks and the half-finished files; the caller's thread only waits for them, in
short steps, so that Cog's cancelling, which can raise at any line of it, leaves nothing behind.
"""

import base64
import binascii
import hashlib
import logging
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path
from typing import Literal, TypeVar

from fetch.cache import LoraCache, Record
from fetch.downloads import download
from fetch.files import CONFIG_FILE, LARGEST_CONFIG, add_metadata, check_lora_file, extract_lora, is_tar
from fetch.hubs import civitai_remote, hugging_face_remote, replicate_remote
from fetch.network import HubDownError, Pace, Stop, open_session
from fetch.references import (
    CivitaiModel,
    DataUri,
    HuggingFaceRepo,
    LocalFile,
    ReplicateModel,
    Source,
    WebFile,
    parse_reference,
)
from fetch.remote import Arrived, Remote, check_space, too_large
from lora.errors import LoraError
from settings import MB, Settings
from threads import TimeLimitError, call_on_new_thread

log = logging.getLogger("flux-lora")

T = TypeVar("T")


@dataclass(frozen=True)
class FetchedLora:
    """A LoRA in the cache, from which it may be evicted at any time; who has opened it can still read it."""

    path: Path
    origin: Literal["disk", "download"]  # where it came from this time
    name: str  # for people
    sha256: str
    fetch_again: Callable[[], "FetchedLora"] = field(repr=False, compare=False)

    def read(self, read: Callable[["FetchedLora"], T]) -> T:
        """What `read` makes of it. If it was evicted before `read` opened its path (`FileNotFoundError`), it is fetched
        once more. Raises `LoraError` when it is evicted again."""
        try:
            return read(self)
        except FileNotFoundError:
            fetched = self.fetch_again()
        try:
            return read(fetched)
        except FileNotFoundError:
            raise LoraError(
                f"{self.name} was evicted from the cache before it was read: LORA_CACHE_GB is too small."
            ) from None


@dataclass(frozen=True)
class _Fetch:
    """What one fetch works with."""

    source: Source
    settings: Settings
    pace: Pace
    cache: LoraCache
    stop: Stop

    def fetched(self, record: Record, origin: Literal["disk", "download"]) -> FetchedLora:
        return FetchedLora(
            self.cache.path(record.sha256),
            origin,
            self.source.label,
            record.sha256,
            lambda: _through_cache(self.source, self.settings, self.pace),
        )


def fetch_lora(reference: str, settings: Settings, pace: Pace = Pace()) -> FetchedLora:  # noqa: B008 - it is frozen
    """The file that `reference` names, from the cache where that is as good as asking.

    Raises `LoraError`, one sentence for the person who asked.
    """
    return _through_cache(parse_reference(reference), settings, pace)


def fetch_weights(weights: str, settings: Settings, pace: Pace = Pace()) -> FetchedLora:  # noqa: B008
    """The LoRA that the operator gave with `COG_WEIGHTS`: a safetensors file, or a tar with one, here or at a URL.

    Unlike a request's, its URL may lead to a private host. Raises `LoraError`.
    """
    source = WebFile(weights) if re.match("https?://", weights) else LocalFile(weights)
    return _through_cache(source, replace(settings, lora_allow_private_hosts=True), pace)


def _through_cache(source: Source, settings: Settings, pace: Pace) -> FetchedLora:
    fetch = _Fetch(source, settings, pace, LoraCache(settings.lora_cache_dir, settings.lora_cache_bytes), Stop())
    if source.immutable and (record := fetch.cache.find(_key(source))):
        return fetch.fetched(record, "disk")
    fetch.cache.prepare()
    try:
        return call_on_new_thread(lambda: _fetch(fetch), pace.total, "lora")
    except TimeLimitError:
        raise HubDownError(f"{source.label} did not arrive within {pace.total:g} seconds.") from None
    finally:
        fetch.stop.set()


def _fetch(fetch: _Fetch) -> FetchedLora:
    source, cache, key = fetch.source, fetch.cache, _key(fetch.source)
    try:
        with cache.lock(key, fetch.stop):
            known = cache.find(key)
            if known and source.immutable:  # another process has fetched it meanwhile
                return fetch.fetched(known, "disk")
            try:
                return _ask(fetch, known)
            except HubDownError as error:
                if known is None:
                    raise
                log.warning("%s The copy in the LoRA cache is used.", error)
                return fetch.fetched(known, "disk")
            finally:
                for kind in ("download", "config", "member", "whole"):
                    cache.part(key, kind).unlink(missing_ok=True)
    except OSError as error:
        raise LoraError(f"LORA_CACHE_DIR is {cache.folder}, which cannot be used: {error.strerror}.") from None


def _ask(fetch: _Fetch, known: Record | None) -> FetchedLora:
    """Ask the source which file it is now, and fetch that unless it is here."""
    source, settings, cache, stop, pace = fetch.source, fetch.settings, fetch.cache, fetch.stop, fetch.pace
    key, started = _key(source), time.monotonic()
    part = cache.part(key, "download")
    if isinstance(source, DataUri):
        return _keep(fetch, _decode(source, part, settings.lora_max_bytes), key)
    if isinstance(source, LocalFile):
        beside = Path(source.path).with_name(CONFIG_FILE)
        config = beside.read_bytes()[:LARGEST_CONFIG] if beside.is_file() else None
        return _keep(fetch, _copy(Path(source.path), part, settings.lora_max_bytes), key, config=config)
    with open_session(settings.lora_allow_private_hosts, _endpoint(source, settings), pace.connections) as session:
        if isinstance(source, ReplicateModel):
            remote = replicate_remote(source, settings, session, stop, pace)
        elif isinstance(source, HuggingFaceRepo):
            remote = hugging_face_remote(source, settings, stop, pace)
        elif isinstance(source, CivitaiModel):
            remote = civitai_remote(source, settings, session, stop, pace)
        else:
            remote = Remote(source.label, source.url, headers=_if_changed(known))
        keys = [key, _key(remote.identity)] if remote.identity else [key]
        if len(keys) == 2 and (same := cache.find(keys[1])):
            cache.link(key, same)
            return fetch.fetched(same, "disk")
        log.info("%s: fetching", source.label)
        arrived = download(session, remote, part, settings.lora_max_bytes, stop, pace)
        config = None
        if arrived and remote.config:
            file = cache.part(key, "config")
            about = replace(remote, url=remote.config, sha256=None, size=None, headers={})
            download(session, about, file, LARGEST_CONFIG, stop, pace)
            config = file.read_bytes()
    if arrived is None and known is not None:
        return fetch.fetched(known, "disk")
    if arrived is None:
        raise LoraError(f"{source.label}: the server says that nothing has changed, but there is nothing yet.")
    fetched = _keep(fetch, arrived, *keys, config=config)
    seconds = time.monotonic() - started
    log.info("%s: fetched %.1f MB in %.1f s", source.label, fetched.path.stat().st_size / MB, seconds)
    return fetched


def _keep(fetch: _Fetch, arrived: Arrived, *keys: str, config: bytes | None = None) -> FetchedLora:
    """What arrived, unpacked and checked, into the cache; PEFT's configuration goes into the file's own metadata, so
    that a LoRA is one file."""
    label, cache = fetch.source.label, fetch.cache
    part = cache.part(keys[0], "download")
    if is_tar(part):
        member = cache.part(keys[0], "member")
        sha256, config = extract_lora(part, member, label, fetch.settings.lora_max_bytes, fetch.stop)
        part, arrived = member, replace(arrived, sha256=sha256)
    check_lora_file(part, label)
    if config is not None:
        whole = cache.part(keys[0], "whole")
        sha256 = add_metadata(part, whole, {CONFIG_FILE: config.decode(errors="replace")}, label, fetch.stop)
        part, arrived = whole, replace(arrived, sha256=sha256)
    fetch.stop.check()
    return fetch.fetched(cache.add(part, arrived, *keys), "download")


def _decode(source: DataUri, part: Path, most_bytes: int) -> Arrived:
    size = len(source.encoded) * 3 // 4
    if size > most_bytes:
        raise too_large(source.label, size, most_bytes)
    try:
        content = base64.b64decode(source.encoded, validate=True)
    except (binascii.Error, ValueError):
        raise LoraError("The data: URI is not base64.") from None
    check_space(part, len(content))
    part.write_bytes(content)
    return Arrived(hashlib.sha256(content).hexdigest())


def _copy(path: Path, part: Path, most_bytes: int) -> Arrived:
    try:
        size = path.stat().st_size
        if size > most_bytes:
            raise too_large(str(path), size, most_bytes)
        check_space(part, size)
        shutil.copyfile(path, part)
        with part.open("rb") as file:
            return Arrived(hashlib.file_digest(file, "sha256").hexdigest())
    except OSError as error:
        raise LoraError(f"{path} cannot be read: {error.strerror}.") from None


def _if_changed(known: Record | None) -> dict[str, str]:
    """RFC 9110, 13.1: a server that would send the same again answers 304 instead."""
    if known is None:
        return {}
    headers = {"If-None-Match": known.etag, "If-Modified-Since": known.last_modified}
    return {name: value for name, value in headers.items() if value}


def _endpoint(source: Source, settings: Settings) -> str | None:
    """The address that the operator trusts for this source; it may be a private one."""
    if isinstance(source, ReplicateModel):
        return settings.replicate_endpoint
    if isinstance(source, CivitaiModel):
        return settings.civitai_endpoint
    return settings.hf_endpoint if isinstance(source, HuggingFaceRepo) else None


def _key(source: Source) -> str:
    """A hash, so that nothing of an address can be read off the cache. A token in it makes it another file's, since
    others may not be allowed to read that."""
    if isinstance(source, CivitaiModel) and source.version is not None:
        source = replace(source, model=None)
    return hashlib.sha256(repr((type(source).__name__, astuple(source))).encode()).hexdigest()
