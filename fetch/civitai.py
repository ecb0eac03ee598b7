"""CivitAI (developer.civitai.com): a model's page has versions, each for one base model; a version has files."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlsplit

from urllib3.exceptions import HTTPError

from fetch.errors import NotFoundError, UnavailableError
from fetch.hub import Address, Hub, Source
from fetch.network import Client
from fetch.remote import RemoteFile, check_answer
from lora.errors import LoraError
from settings import Settings

FLUX_1 = "flux.1"  # its names of base models: "Flux.1 D", "Flux.1 S", "Flux.1 Krea", "Flux.1 Kontext"
LORA_TYPES = ("LORA", "LoCon", "DoRA")
MOST_JSON = 32 * 10**6  # bytes

Json = dict[str, Any]
Ask = Callable[[str], Json]


@dataclass(frozen=True)
class CivitaiModel(Source):
    """A model's page, or one version of a model. The token is one that was in the pasted address."""

    model: int | None
    version: int | None = None
    token: str | None = field(default=None, repr=False)

    @property
    def label(self) -> str:
        page = f"civitai.com/models/{self.model}" if self.model else "civitai.com"
        return f"{page} version {self.version}" if self.version else page

    @property
    def immutable(self) -> bool:
        return self.version is not None

    @property
    def key(self) -> str:
        """A version has the same key with and without its model."""
        named_twice = self.model is not None and self.version is not None
        return replace(self, model=None).key if named_twice else super().key

    def endpoint(self, settings: Settings) -> str:
        return settings.civitai_endpoint

    def resolve(self, settings: Settings, client: Client) -> RemoteFile:
        """The safetensors file of the version; a model's page stands for its newest version for FLUX.1. An id that is
        no model's is taken for a version's."""
        endpoint, token = settings.civitai_endpoint, self.token or settings.civitai_api_token
        remote = RemoteFile(self.label, endpoint, token, "CIVITAI_API_TOKEN")

        def ask(path: str) -> Json:
            about = replace(remote, url=f"{endpoint}/api/v1/{path}")
            return client.retrying(lambda: _read_json(client, about))

        try:
            version = _choose_version(self, ask)
            file = _choose_file(version, self.label)
            number = int(version["id"])
            hashes = {str(kind).upper(): value for kind, value in (file.get("hashes") or {}).items()}
            sha256 = str(hashes["SHA256"]) if hashes.get("SHA256") else None
            query = urlsplit(str(file.get("downloadUrl") or "")).query  # which of a version's files it is
        except LoraError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError):
            raise _not_understood(self.label) from None
        url = f"{endpoint}/api/download/models/{number}" + (f"?{query}" if query else "")
        return replace(remote, url=url, sha256=sha256, key=CivitaiModel(None, number, self.token).key)


def _read_json(client: Client, remote: RemoteFile) -> Json:
    with client.get(remote.url, remote.label, remote.token, {"Accept": "application/json"}) as response:
        check_answer(response, remote)
        try:
            document = json.loads(response.raw.read(MOST_JSON))
        except (HTTPError, OSError, ValueError):
            raise UnavailableError(f"{remote.label}: CivitAI's answer is not understood.", retry_after=0) from None
    if not isinstance(document, dict):
        raise _not_understood(remote.label)
    return document


def _choose_version(source: CivitaiModel, ask: Ask) -> Json:
    """The version that is meant. Raises `LoraError`, which says what it is for when that is not FLUX.1."""
    if source.version is not None:
        versions = [ask(f"model-versions/{source.version}")]
        kind = versions[0].get("model", {}).get("type")
    else:
        try:
            page = ask(f"models/{source.model}")
            versions, kind = page["modelVersions"], page.get("type")
        except NotFoundError:
            versions = [ask(f"model-versions/{source.model}")]
            kind = versions[0].get("model", {}).get("type")
    if kind and kind not in LORA_TYPES:
        raise LoraError(f"{source.label} is no LoRA: CivitAI lists it as {kind}.")
    bases = list(dict.fromkeys(str(version.get("baseModel")) for version in versions))
    fitting = [version for version in versions if str(version.get("baseModel")).lower().startswith(FLUX_1)]
    if not fitting:
        raise LoraError(f"{source.label} is for {', '.join(bases) or 'no base model at all'}, not for FLUX.1.")
    return max(fitting, key=lambda version: str(version.get("publishedAt") or version.get("createdAt") or ""))


def _choose_file(version: Json, label: str) -> Json:
    """The primary file where it is safetensors, else the first that is."""
    files = [
        file
        for file in version["files"]
        if file.get("type", "Model") == "Model" and str(file.get("name")).lower().endswith(".safetensors")
    ]
    if not files:
        raise LoraError(f"{label} has no .safetensors file, and no other kind is ever loaded.")
    best: Json = max(files, key=lambda file: bool(file.get("primary")))
    return best


def _not_understood(label: str) -> LoraError:
    return LoraError(f"{label}: CivitAI's answer is not understood.")


def _parse(address: Address) -> CivitaiModel | None:
    """civitai.com/models/<id>/<name>?modelVersionId=<version>, and the addresses of its API."""
    path, token = "/".join(address.parts).lower(), address.query.get("token") or None
    if match := re.fullmatch(r"(?:api/download/models|(?:api/v1/)?model-versions)/(\d{1,18})", path):
        return CivitaiModel(None, int(match[1]), token)
    version = address.query.get("modelversionid", "")
    if not re.fullmatch(r"\d{0,18}", version, re.ASCII):
        return None
    if match := re.fullmatch(r"(?:api/v1/)?models/(\d{1,18})(?:/.*)?", path, re.ASCII):
        return CivitaiModel(int(match[1]), int(version) if version else None, token)
    return None


HUB = Hub(
    hosts=("civitai.com", "civitai.green", "civitai.red"),  # one service with one set of ids
    accepted="civitai.com/models/<id>",
    parse=_parse,
)
