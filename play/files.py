"""The files of one run of the page: pictures drawn, pictures and masks given, LoRAs chosen; gone when the page ends."""

import base64
import hashlib
import mimetypes
import re
from dataclasses import dataclass
from pathlib import Path

import httpx

EXTENSIONS = {"image/jpeg": ".jpg"}  # where the usual one is not mimetypes' first


@dataclass(frozen=True)
class File:
    """A file of this run; its name says which content it has."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def kind(self) -> str:
        """Its media type."""
        return mimetypes.guess_type(self.name)[0] or "application/octet-stream"

    @property
    def is_picture(self) -> bool:
        return self.kind.startswith("image/")

    def data_url(self) -> str:
        return f"data:{self.kind};base64,{base64.b64encode(self.path.read_bytes()).decode()}"


class Files:
    """The files in one folder, found again by their names."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(self, content: bytes, name: str) -> File:
        """Keep `content`; its name becomes `name` with the start of its hash, so equal files have one name."""
        stem, suffix = Path(name).stem, Path(name).suffix
        mark = hashlib.sha256(content).hexdigest()[:8]
        path = self.folder / f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', stem)[:60]}-{mark}{suffix}"
        if not path.exists():
            path.write_bytes(content)
        return File(path)

    def find(self, name: str) -> File | None:
        """The file of that name, or None."""
        path = self.folder / name
        return File(path) if name == Path(name).name and path.is_file() else None

    def add_picture(self, url: str, stem: str) -> File:
        """Keep the picture at a data: URI or an http(s) address, its bytes as they are.

        Raises `ValueError` or `httpx.HTTPError` when there is no picture at `url`.
        """
        if url.startswith("data:"):
            header, _, text = url.partition(",")
            kind = header.removeprefix("data:").partition(";")[0]
            content = base64.b64decode(text)
        else:
            response = httpx.get(url, follow_redirects=True, timeout=60).raise_for_status()
            kind, content = response.headers.get("content-type", "").partition(";")[0], response.content
        return self.add(content, f"{stem}{EXTENSIONS.get(kind) or mimetypes.guess_extension(kind) or ''}")
