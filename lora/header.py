"""The header of a safetensors file: what is in it, known before any tensor is read.

The format is a length, a JSON header of dtypes, shapes and places, and the bytes (github.com/huggingface/safetensors).
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from lora.errors import LoraError

CONFIG_FILE = "adapter_config.json"  # what PEFT writes beside an adapter; fetched files carry it in their metadata
MOST_TENSORS = 50_000  # FLUX.1 has 1,500 parameters
MOST_TEXT = 120  # characters of a key in one error

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """A tensor as the header has it."""

    dtype: str
    shape: Shape
    start: int  # of its bytes, from the end of the header
    stop: int


@dataclass(frozen=True)
class Header:
    """Of every tensor what and where it is, and the metadata."""

    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    size: int  # bytes, its length included


def read_header(path: Path, name: str) -> Header:
    """Raises `LoraError` unless `path` is a whole safetensors file.

    safetensors itself checks that: a bounded header, known dtypes, shapes and offsets that agree with each other and
    cover the file without gap or overlap.
    """
    try:
        with safe_open(path, framework="np"):
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            values = json.loads(file.read(length))
        metadata = values.pop("__metadata__", None) or {}
        entries = {key: Entry(one["dtype"], tuple(one["shape"]), *one["data_offsets"]) for key, one in values.items()}
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise LoraError(f"{name} is not a whole safetensors file ({_first_words(error)}).") from None
    if not entries:
        raise LoraError(f"{name} is a safetensors file without a single tensor.")
    if len(entries) > MOST_TENSORS:
        raise LoraError(f"{name} has {len(entries)} tensors; no LoRA has more than {MOST_TENSORS}.")
    return Header(entries, metadata, 8 + length)


def shown(key: str) -> str:
    """A key as an error may show it: on one line and not for ever."""
    return key if len(key) <= MOST_TEXT and key.isprintable() else repr(key[:MOST_TEXT])


def _first_words(error: Exception) -> str:
    return re.sub(r"\s+", " ", str(error)).strip().removeprefix("Error while deserializing header: ")[:100]
