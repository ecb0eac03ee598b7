"""Files that are on no hub: at any address, in the reference itself, or on the operator's disk."""

import base64
import binascii
import re
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit, urlunsplit

from fetch.hub import Address, Source
from fetch.limits import too_large
from fetch.network import Client
from fetch.remote import RemoteFile
from lora.errors import LoraError
from settings import Settings

ACCEPTED = "the http(s) address of a .safetensors file, or a data: URI"
TRAINED = "replicate.delivery"  # on its subdomains Replicate keeps the tars that its trainings make


@dataclass(frozen=True)
class WebFile(Source):
    """A file anywhere. The query may hold a secret and is never shown."""

    url: str = field(repr=False)

    @property
    def label(self) -> str:
        parts = urlsplit(self.url)
        return f"{parts.netloc}{parts.path}"

    immutable = False

    def resolve(self, settings: Settings, client: Client) -> RemoteFile:
        return RemoteFile(self.label, self.url)


@dataclass(frozen=True)
class DataUri(Source):
    """A file that came with the request, in base64."""

    encoded: str = field(repr=False)

    label = "the data: URI"
    immutable = True

    def resolve(self, settings: Settings, client: Client) -> bytes:
        size = len(self.encoded) * 3 // 4
        if size > settings.lora_max_bytes:
            raise too_large(self.label, size, settings.lora_max_bytes)
        try:
            return base64.b64decode(self.encoded, validate=True)
        except (binascii.Error, ValueError):
            raise LoraError("The data: URI is not base64.") from None


@dataclass(frozen=True)
class LocalFile(Source):
    """A file of the operator's on this machine; no request can name one."""

    path: str

    @property
    def label(self) -> str:
        return self.path

    immutable = False

    def resolve(self, settings: Settings, client: Client) -> Path:
        return Path(self.path)


@dataclass(frozen=True)
class FolderFile(Source):
    """A file in LORA_FOLDER, where the operator keeps LoRAs that requests may name."""

    name: str  # of the file, without a folder

    @property
    def label(self) -> str:
        return self.name

    immutable = False

    def resolve(self, settings: Settings, client: Client) -> Path:
        return self.path(settings)

    def path(self, settings: Settings) -> Path:
        """Nothing outside the folder is opened, wherever a link leads. Raises `LoraError`."""
        if settings.lora_folder is None:
            raise LoraError(f"{self.name!r} is the name of a file, and LORA_FOLDER names no folder: use {ACCEPTED}.")
        folder = settings.lora_folder.resolve()
        path = (folder / self.name).resolve()
        if path.parent != folder or not path.is_file():
            raise LoraError(f"LORA_FOLDER has no file {self.name!r}.")
        return path


def parse_file_name(text: str) -> FolderFile | None:
    """<file>.safetensors and no more."""
    plain = re.fullmatch(r"[^/\\?#:%]+\.safetensors", text, re.IGNORECASE) and not text.startswith(".")
    return FolderFile(text) if plain else None


def parse_address(address: Address) -> WebFile | None:
    """The address of a .safetensors file, or of a tar where Replicate keeps those."""
    url, path = address.url, address.url.path.rstrip("/")
    trained = f".{address.host}".endswith(f".{TRAINED}")
    if not path.lower().endswith((".safetensors", ".tar") if trained else ".safetensors"):
        return None
    return WebFile(urlunsplit((url.scheme.lower(), url.netloc.lower(), path, url.query, "")))


def parse_data_uri(text: str) -> DataUri:
    """data:[<media type>];base64,<data> (RFC 2397); the data may be percent-encoded. Raises `LoraError`."""
    header, comma, encoded = text.partition(",")
    if not comma or not header.lower().endswith(";base64"):
        raise LoraError("The data: URI is not of the form data:application/octet-stream;base64,<data>.")
    return DataUri(unquote(encoded))
