"""What a downloaded file is when it is no safetensors file, and what its sender should send instead."""

import json
from pathlib import Path

from lora.errors import LoraError

LOOKED_AT = 4096  # bytes from a file's start
LARGEST_JSON = 1 << 20  # bytes
UNPACK = "unpack it and use the .safetensors file in it"
STARTS = {  # a file's first bytes -> what it is, and what would be right
    b"PK\x03\x04": ("a zip archive, or a PyTorch file, which is one", UNPACK),
    b"\x1f\x8b": ("a gzip archive, such as a .tar.gz", UNPACK),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", UNPACK),
    b"Rar!": ("a rar archive", UNPACK),
    b"\x80\x02": ("a pickle, which is never loaded", "convert it to safetensors"),
    b"\x80\x04": ("a pickle, which is never loaded", "convert it to safetensors"),
    b"version https://git-lfs.github.com/": (
        "a Git LFS pointer, which stands for the file",
        "use the address from which the file itself is downloaded, such as a Hugging Face /resolve/ address",
    ),
}


def check_content(path: Path, label: str) -> None:
    """Raises `LoraError` for a file of a kind that people send by mistake."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(LOOKED_AT)
    for first, (kind, instead) in STARTS.items():
        if start.startswith(first):
            raise _not_safetensors(label, kind, instead)
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype html", b"<html")):
        raise _not_safetensors(label, "a web page", "use the address of the file itself, or a token if it is private")
    if text[:1] in (b"{", b"[") and size <= LARGEST_JSON and _is_json(path):
        raise _not_safetensors(label, "JSON, an answer or a configuration", "use the address of the file itself")


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return False
    return True


def _not_safetensors(label: str, kind: str, instead: str) -> LoraError:
    return LoraError(f"{label} is not a whole safetensors file: it is {kind}; {instead}.")
