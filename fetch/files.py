"""What was downloaded, before anyone sees it: a tar gives its one LoRA file, and a LoRA file has to be safetensors."""

import hashlib
import json
import logging
import tarfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import IO

from fetch.errors import CacheError
from fetch.limits import check_space, too_large
from fetch.network import Cancellation
from lora.errors import LoraError
from lora.families import foreign_family
from lora.header import CONFIG_FILE, read_header, shown
from lora.names import is_adapter_key

log = logging.getLogger("flux-lora")

KNOWN_NAMES = ("lora.safetensors", "pytorch_lora_weights.safetensors", "adapter_model.safetensors")
SUFFIX = ".safetensors"
LARGEST_CONFIG = 1 << 20  # bytes
MOST_MEMBERS = 10_000
LARGEST_READ = 1 << 16  # tarfile reads a long name or a PAX header in one piece, of whatever size it claims
MOST_HEADERS = 1 << 25  # bytes of all headers together, which tarfile keeps
BLOCK = 1 << 20
ALIGNMENT = 8  # of the header's end, as safetensors itself writes it


def choose_file(names: Sequence[str]) -> str | None:
    """The one of `names` that is the LoRA: a well-known name, the outermost first, or the only one there is."""
    for known in KNOWN_NAMES:
        matches = sorted(
            (name for name in names if PurePosixPath(name).name == known), key=lambda name: name.count("/")
        )
        if len(matches) == 1 or (matches and matches[0].count("/") < matches[1].count("/")):
            return matches[0]
    return names[0] if len(names) == 1 else None


def config_beside(name: str, names: Collection[str]) -> str | None:
    """PEFT's configuration of the adapter in the file `name`, where it is among `names`."""
    beside = str(PurePosixPath(name).with_name(CONFIG_FILE))
    return beside if beside in names else None


def is_tar(path: Path) -> bool:
    """Whether it has the magic number of POSIX and GNU archives."""
    with path.open("rb") as file:
        file.seek(257)
        return file.read(5) == b"ustar"


def extract_lora(
    archive: Path, into: Path, label: str, most_bytes: int, cancellation: Cancellation
) -> tuple[str, bytes | None]:
    """Copy the LoRA file of a tar to `into`, and nothing else. Returns its SHA-256 and PEFT's configuration beside it.

    A member's name is compared and never used as a path; links, devices and sparse files do not count. Raises
    `LoraError`.
    """
    try:
        with archive.open("rb") as file:
            members = _regular_members(file, label, cancellation)
            files = [name for name in members if name.lower().endswith(SUFFIX)]
            name = choose_file(files)
            if name is None:
                names = ", ".join(shown(name) for name in sorted(files)[:5])
                found = f"several .safetensors files ({names})" if files else "no .safetensors file"
                raise LoraError(f"{label}: the archive holds {found}; it must hold one, or one named {KNOWN_NAMES[0]}.")
            start, size = members[name]
            if size > most_bytes:
                raise too_large(f"{label}: {shown(name)}", size, most_bytes)
            check_space(into, size)
            config = None
            if beside := config_beside(name, members):
                file.seek(members[beside][0])
                config = file.read(min(members[beside][1], LARGEST_CONFIG))
            file.seek(start)
            return _write(_member(file, size), into, label, cancellation), config
    except LoraError:
        raise
    except (tarfile.TarError, ValueError, EOFError, OverflowError, RecursionError) as error:
        # tarfile calls itself once for each header that only describes the next one
        log.info("%s: reading the archive: %s: %s", label, type(error).__name__, error)
        raise LoraError(f"{label}: the archive is damaged.") from None


def check_lora_file(path: Path, label: str) -> None:
    """Raises `LoraError` unless `path` is a complete safetensors file that looks like a LoRA."""
    header = read_header(path, label)
    if not any(map(is_adapter_key, header.entries)):
        raise LoraError(f"{label} is {foreign_family(header) or 'not a LoRA'}.")


def add_metadata(path: Path, into: Path, more: Mapping[str, str], label: str, cancellation: Cancellation) -> str:
    """Copy a safetensors file to `into` and add `more` metadata. Returns the copy's SHA-256. Raises `LoraError`."""
    check_space(into, path.stat().st_size)
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        header["__metadata__"] = {**header.get("__metadata__", {}), **more}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % ALIGNMENT)
        start = len(text).to_bytes(8, "little") + text
        return _write(chain([start], iter(lambda: file.read(BLOCK), b"")), into, label, cancellation)


class _Reader:
    """A file of which tarfile can read small pieces only."""

    def __init__(self, file: IO[bytes]) -> None:
        self.seek, self.tell, self._file, self._left = file.seek, file.tell, file, MOST_HEADERS

    def read(self, size: int) -> bytes:
        self._left -= size
        if not 0 <= size <= LARGEST_READ or self._left < 0:
            raise tarfile.ReadError("a header claims an unreasonable size")
        return self._file.read(size)


def _regular_members(file: IO[bytes], label: str, cancellation: Cancellation) -> dict[str, tuple[int, int]]:
    """The members that may matter, and where their bytes are: name -> (start, size)."""
    found = {}
    with tarfile.open(fileobj=_Reader(file), mode="r:") as archive:  # type: ignore[call-overload]
        for count, member in enumerate(archive):
            cancellation.check()
            if count >= MOST_MEMBERS:
                raise LoraError(f"{label}: the archive holds more than {MOST_MEMBERS} files.")
            if (
                member.isreg()
                and not member.issparse()
                and member.size >= 0
                and member.offset_data >= 0
                and (member.name.lower().endswith(SUFFIX) or PurePosixPath(member.name).name == CONFIG_FILE)
            ):
                found[member.name] = (member.offset_data, member.size)
    return found


def _member(file: IO[bytes], size: int) -> Iterator[bytes]:
    while size:
        block = file.read(min(size, BLOCK))
        if not block:
            raise tarfile.ReadError
        size -= len(block)
        yield block


def _write(blocks: Iterable[bytes], into: Path, label: str, cancellation: Cancellation) -> str:
    """Returns the SHA-256 of what is written."""
    digest = hashlib.sha256()
    try:
        with into.open("wb") as output:
            for block in blocks:
                cancellation.check()
                digest.update(block)
                output.write(block)
    except OSError as error:
        raise CacheError(f"{label} cannot be written into LORA_CACHE_DIR: {error.strerror}.") from None
    return digest.hexdigest()
