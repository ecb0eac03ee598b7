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
MOST_BYTES = 25_000_000  # of a header: 500 for each of so many tensors
SAFETENSORS_MOST_BYTES = 100_000_000  # safetensors' own limit
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
    """Raises `LoraError` unless `path` is a whole safetensors file, with no more in it than a LoRA may have.

    safetensors itself checks the first: known dtypes, shapes and offsets that agree with each other and cover the file
    without gap or overlap.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            text = file.read(min(length, MOST_BYTES + 1))
        if error := _too_large(text, length, name):
            raise error
        with safe_open(path, framework="np"):
            pass
        values = json.loads(text)
        metadata = values.pop("__metadata__", None) or {}
        entries = {key: Entry(one["dtype"], tuple(one["shape"]), *one["data_offsets"]) for key, one in values.items()}
    except LoraError:
        raise
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise LoraError(f"{name} is not a whole safetensors file ({_first_words(error)}).") from None
    if not entries:
        raise LoraError(f"{name} is a safetensors file without a single tensor.")
    if len(entries) > MOST_TENSORS:  # with a spelling of "data_offsets" that was not counted
        raise _too_many(len(entries), name)
    return Header(entries, metadata, 8 + length)


def _too_large(text: bytes, length: int, name: str) -> LoraError | None:
    """The error for a header that would take long to parse; its tensors are counted without."""
    tensors = text.count(b'"data_offsets"')
    if tensors > MOST_TENSORS:
        return _too_many(tensors, name)
    if len(text) > MOST_BYTES and length <= SAFETENSORS_MOST_BYTES:  # what claims more is no safetensors file
        return LoraError(f"{name} has a header of {length} bytes; no LoRA's has more than {MOST_BYTES}.")
    return None


def _too_many(tensors: int, name: str) -> LoraError:
    return LoraError(f"{name} has {tensors} tensors; no LoRA has more than {MOST_TENSORS}.")


def shown(key: str) -> str:
    """A key as an error may show it: on one line and not for ever."""
    return key if len(key) <= MOST_TEXT and key.isprintable() else repr(key[:MOST_TEXT])


def _first_words(error: Exception) -> str:
    return re.sub(r"\s+", " ", str(error)).strip().removeprefix("Error while deserializing header: ")[:100]
