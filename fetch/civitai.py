"""CivitAI (developer.civitai.com): a model's page has versions, each for one base model; a version has files."""

import json
import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit

from urllib3.exceptions import HTTPError

from fetch import trigger_words
from fetch.errors import NotFoundError, UnavailableError
from fetch.hub import Address, Hub, Source
from fetch.network import Client
from fetch.remote import RemoteFile, check_answer
from lora.errors import LoraError
from lora.header import shown
from settings import Settings

FLUX_1 = "flux.1"  # its names of base models: "Flux.1 D", "Flux.1 S", "Flux.1 Krea", "Flux.1 Kontext"
NEVER_FLUX = ("sd ", "sdxl", "pony", "illustrious", "noobai")  # how the names of Stable Diffusion's begin
LORA_TYPES = ("LORA", "LoCon", "DoRA")
COMMERCIAL_USES = {
    "Image": "images",
    "RentCivit": "CivitAI's own generator",
    "Rent": "generation services",
    "Sell": "selling the model or merges of it",
}
MOST_JSON = 32 * 10**6  # bytes
# What an address of its downloads may say of a version's file (civitai/civitai, api/download/models), in lower case.
CHOICES = ("type", "format", "size", "fp", "quanttype", "fileid")
NUMBER = r"\d{1,18}"

Json = dict[str, Any]
Ask = Callable[[str], Json]


@dataclass(frozen=True)
class CivitaiModel(Source):
    """A model's page, or one version of a model, and which of its files where the address says so. The token is one
    that was in the pasted address."""

    model: int | None
    version: int | None = None
    token: str | None = field(default=None, repr=False)
    choice: tuple[tuple[str, str], ...] = ()  # of CHOICES, with their values in lower case
    host: str = field(default="civitai.com", compare=False)  # as it was asked for

    @property
    def identity(self) -> tuple[object, ...]:
        """A version has the same one with and without its model."""
        model = None if self.version is not None else self.model
        return (model, self.version, self.token, *([self.choice] if self.choice else []))

    @property
    def label(self) -> str:
        page = f"{self.host}/models/{self.model}" if self.model else self.host
        return f"{page} version {self.version}" if self.version else page

    @property
    def immutable(self) -> bool:
        return self.version is not None

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
            page, version = _choose_version(self, ask)
            if not token:
                _check_access(self, version, ask)
            file = _choose_file(version, self)
            number = int(version["id"])
            words = trigger_words.clean(version.get("trainedWords") or [])
            hashes = {str(kind).upper(): value for kind, value in (file.get("hashes") or {}).items()}
            sha256 = str(hashes["SHA256"]) if hashes.get("SHA256") else None
            # which of a version's files it is: only its id tells files of the same format, size and precision apart
            by_id = any(name == "fileid" for name, _ in self.choice)
            query = f"fileId={file['id']}" if by_id else urlsplit(str(file.get("downloadUrl") or "")).query
            licence = permissions(page)
        except LoraError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError):
            raise _not_understood(self.label) from None
        url = f"{endpoint}/api/download/models/{number}" + (f"?{query}" if query else "")
        key = CivitaiModel(None, number, self.token, self.choice).key
        return replace(remote, url=url, sha256=sha256, key=key, trigger_words=words, licence=licence)


def _read_json(client: Client, remote: RemoteFile) -> Json:
    with client.get(remote.url, remote.label, remote.token, {"Accept": "application/json"}) as response:
        check_answer(response, remote)
        try:
            document = json.loads(response.raw.read(MOST_JSON))
        except (HTTPError, HTTPException, OSError, ValueError, RecursionError):
            client.cancellation.check()
            raise UnavailableError(f"{remote.label}: CivitAI's answer is not understood.", retry_after=0) from None
    if not isinstance(document, dict):
        raise _not_understood(remote.label)
    return document


def _choose_version(source: CivitaiModel, ask: Ask) -> tuple[Json, Json]:
    """The model's page, empty where only the version was asked for, and the version that is meant. Raises `LoraError`,
    which says what it is for when that is not FLUX.1."""
    page: Json = {}
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
        raise LoraError(f"{source.label} is no LoRA: CivitAI lists it as {shown(str(kind))}.")
    bases = list(dict.fromkeys(str(version.get("baseModel")) for version in versions))
    if not versions:
        raise LoraError(f"{source.label} has no version that is published.")
    if source.version is not None and not bases[0].lower().startswith(NEVER_FLUX):
        return page, versions[0]  # its file says what it is: labels are often wrong, or newer than these lines
    fitting = [version for version in versions if _base(version).startswith(FLUX_1)]
    if not fitting:
        raise LoraError(
            f"{source.label} is for {', '.join(map(shown, bases[:8])) or 'no base model at all'}, not for FLUX.1."
        )
    return page, _newest(fitting)


def _base(version: Json) -> str:
    return str(version.get("baseModel")).lower()


def _newest(versions: Sequence[Json]) -> Json:
    return max(versions, key=lambda version: str(version.get("publishedAt") or version.get("createdAt") or ""))


def _check_access(source: CivitaiModel, version: Json, ask: Ask) -> None:
    """Raises `LoraError` for a version that CivitAI gives to nobody without an account that bought it."""
    if (why := _closed(version)) is None:
        return
    model, free = version.get("modelId") or source.model, None
    with suppress(LoraError, KeyError, TypeError, ValueError):
        others = [one for one in ask(f"models/{model}")["modelVersions"] if _base(one).startswith(FLUX_1)]
        free = _newest([one for one in others if _closed(one) is None])["id"]
    hint = f": the newest version that is free is civitai.com/models/{model}?modelVersionId={free}" if free else ""
    raise LoraError(f"{source.label}{_shown_version(source, version)} {why}{hint}.")


def _shown_version(source: CivitaiModel, version: Json) -> str:
    return "" if source.version else f" version {version.get('id')}"


def _closed(version: Json) -> str | None:
    """Why a version cannot be downloaded; None where it can."""
    if str(version.get("usageControl") or "Download").lower() != "download":
        return "cannot be downloaded: its author allows it for CivitAI's own generator only"
    until = str(version.get("earlyAccessEndsAt") or version.get("earlyAccessDeadline") or "")
    if str(version.get("availability")).lower() != "earlyaccess" and not until:
        return None
    try:
        if until and datetime.fromisoformat(until).timestamp() < time.time():
            return None
    except ValueError:
        until = ""
    return "is in early access, for those who bought it" + (f", until {until[:10]}" if until else "")


def _choose_file(version: Json, source: CivitaiModel) -> Json:
    """The file that the address chooses, else the primary one where it is safetensors, else the first that is."""
    of_type = [file for file in version["files"] if file.get("type", "Model") == "Model"]
    files = [file for file in of_type if str(file.get("name")).lower().endswith(".safetensors")]
    if not files:
        raise LoraError(f"{source.label} has no .safetensors file, and no other kind is ever loaded.")
    chosen = [file for file in files if all(_matches(file, *choice) for choice in source.choice)]
    if not chosen:
        asked = ", ".join(f"{name}={value}" for name, value in source.choice)
        there = ", ".join(sorted(_traits(file) for file in files))
        raise LoraError(f"{source.label} has no .safetensors file with {asked}; there are {there}.")
    best: Json = max(chosen, key=lambda file: bool(file.get("primary")))
    return best


def _matches(file: Json, name: str, value: str) -> bool:
    """What CivitAI does not say of a file rules nothing out."""
    if name == "fileid":
        return str(file.get("id")) == value
    metadata = {key.lower(): known for key, known in (file.get("metadata") or {}).items()}
    known = file.get("type", "Model") if name == "type" else metadata.get(name)
    return known is None or str(known).lower() == value


def _traits(file: Json) -> str:
    metadata = file.get("metadata") or {}
    traits = [f"{name}={metadata[name]}" for name in ("format", "size", "fp", "quantType") if metadata.get(name)]
    traits += [f"fileId={file['id']}"] if file.get("id") else []
    return f"{str(file.get('name'))[:100]} ({' '.join(traits) or 'no more is known of it'})"


def permissions(page: Json) -> str | None:
    """What a model's author allows, by the flags of its page; None where they are not there."""
    flags = ("allowNoCredit", "allowCommercialUse", "allowDerivatives", "allowDifferentLicense")
    if not all(flag in page for flag in flags):
        return None
    uses = set(re.findall(r"\w+", str(page["allowCommercialUse"])))  # of a list, or of text as in "{Image,Rent}"
    allowed = [what for use, what in COMMERCIAL_USES.items() if use in uses]
    return "; ".join(
        (
            "no credit needed" if page["allowNoCredit"] else "credit to the author",
            f"commercial use: {', '.join(allowed) or 'none'}",
            "merges may be shared" if page["allowDerivatives"] else "no merges",
            *(() if page["allowDifferentLicense"] else ("merges under the same permissions",)),
        )
    )


def _not_understood(label: str) -> LoraError:
    return LoraError(f"{label}: CivitAI's answer is not understood.")


def parse_air(text: str) -> CivitaiModel | None:
    """urn:air:<ecosystem>:<type>:civitai:<model>@<version>, the names that CivitAI's pages show (AIR, its wiki)."""
    pattern = rf"(?:urn:)?air:[\w-]+:[\w-]+:civitai:({NUMBER})(?:@({NUMBER}))?(?::\d+)?(?:\.\w+)?"
    match = re.fullmatch(pattern, text, re.IGNORECASE | re.ASCII)
    return CivitaiModel(int(match[1]), int(match[2]) if match[2] else None) if match else None


def _parse(address: Address) -> CivitaiModel | None:
    """civitai.com/models/<id>/<name>?modelVersionId=<version>, and the addresses of its API. What else the query may
    say of the file (CHOICES) counts as well."""
    path, token = "/".join(address.parts).lower(), address.query.get("token") or None
    choice = tuple((name, address.query[name].lower()) for name in CHOICES if address.query.get(name))
    if match := re.fullmatch(rf"(?:api/download/models|(?:api/v1/)?model-versions)/({NUMBER})", path, re.ASCII):
        return CivitaiModel(None, int(match[1]), token, choice, address.host)
    version = address.query.get("modelversionid", "")
    if not re.fullmatch(r"\d{0,18}", version, re.ASCII):
        return None
    if match := re.fullmatch(rf"(?:api/v1/)?models/({NUMBER})(?:/.*)?", path, re.ASCII):
        return CivitaiModel(int(match[1]), int(version) if version else None, token, choice, address.host)
    return None


HUB = Hub(
    hosts=("civitai.com", "civitai.green", "civitai.red"),  # one service with one set of ids
    accepted="civitai.com/models/<id>",
    parse=_parse,
)
