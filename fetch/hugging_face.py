"""Hugging Face: a repo at a branch, tag or commit holds files, one of which is the LoRA."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

import requests
from huggingface_hub import get_token, hf_hub_url, is_offline_mode
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # exported lazily
from urllib3.exceptions import HTTPError

from fetch.errors import UnavailableError
from fetch.files import KNOWN_NAMES, choose_file, config_beside
from fetch.hub import Address, Hub, Source
from fetch.network import Client
from fetch.remote import RemoteFile
from fetch.trigger_words import clean, of_card
from lora.errors import LoraError
from lora.header import shown
from service.hugging_face import refusal, refusal_of
from settings import Settings

NOT_OWNERS = ("api", "collections", "datasets", "docs", "models", "spaces")  # first parts of its other pages
MOST_NAMES = 8  # listed in one error
WRONG_TOKEN = "Invalid credentials in Authorization header"  # noqa: S105 - its words, no token
MOST_JSON = 32 * 10**6  # bytes


@dataclass(frozen=True)
class File:
    """What the API says of one file of a repo."""

    size: int | None  # bytes
    sha256: str | None  # of those that are kept as large files


Files = Mapping[str, File]


@dataclass(frozen=True)
class Info:
    """What the API says of a repo at a revision."""

    commit: str | None
    files: Files
    card: Mapping[str, Any]  # what the repo's README says of itself


@dataclass(frozen=True)
class HuggingFaceRepo(Source):
    """A repo, at a branch, tag or commit (None: main), and a file of it (None: the one that is the LoRA, of a folder
    where one is named). The token is one that was in the pasted address."""

    repo: str
    revision: str | None = None
    file: str | None = None
    token: str | None = field(default=None, repr=False)
    folder: str = ""

    @property
    def identity(self) -> tuple[object, ...]:
        more = [one for one in (self.token, self.folder and f"{self.folder}/") if one]
        return (self.repo, self.revision, self.file, *more)

    @property
    def label(self) -> str:
        at = f"@{self.revision}" if self.revision else ""
        return "/".join(part for part in (f"huggingface.co/{self.repo}{at}", self.folder, self.file) if part)

    @property
    def immutable(self) -> bool:
        return re.fullmatch(r"[0-9a-f]{40}", self.revision or "") is not None

    def endpoint(self, settings: Settings) -> str:
        return settings.hf_endpoint

    def resolve(self, settings: Settings, client: Client) -> RemoteFile:
        """The file at the commit that the revision is now."""
        info = client.retrying(lambda: _model_info(self, settings, client))
        files = info.files
        name = self.file or _choose_lora(self, _within(self.folder, files))
        if name not in files:
            raise LoraError(f"{self.label} does not exist: the repo {_file_list(files)}.")
        file, commit = files[name], info.commit or self.revision or "main"
        config = config_beside(name, files)

        def url(name: str) -> str:
            return hf_hub_url(self.repo, name, revision=commit, endpoint=settings.hf_endpoint)

        return RemoteFile(
            self.label,
            url(name),
            self.token or settings.hf_token or get_token(),
            "HF_TOKEN",
            sha256=file.sha256,
            size=file.size,
            key=HuggingFaceRepo(self.repo, commit, name, self.token).key,
            config_url=url(config) if config else None,
            trigger_words=of_card(info.card),
            licence=_licence(info.card),
        )


def _model_info(source: HuggingFaceRepo, settings: Settings, client: Client) -> Info:
    """What Hugging Face's API says of the repo (huggingface.co/docs/hub/api), asked by our own client, which follows no
    redirect to a private host. Raises `LoraError`."""
    try:
        validate_repo_id(source.repo)
    except HFValidationError as error:
        raise LoraError(f"{source.label} {refusal(error, source.token or settings.hf_token)}.") from None
    if is_offline_mode():
        raise UnavailableError(f"{source.label}: HF_HUB_OFFLINE is set, so Hugging Face is not asked.")
    token = source.token or settings.hf_token or get_token()
    revision = f"/revision/{quote(source.revision, safe='')}" if source.revision else ""
    url = f"{settings.hf_endpoint}/api/models/{source.repo}{revision}?blobs=true"
    with client.get(url, source.label, token, {"Accept": "application/json"}) as response:
        _check_answer(response, source, source.token or settings.hf_token)
        try:
            return _read_info(response.raw.read(MOST_JSON))
        except (HTTPError, OSError, json.JSONDecodeError):  # the last of an answer that broke off
            raise UnavailableError(f"{source.label}: Hugging Face cannot be reached.", retry_after=0) from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise LoraError(f"{source.label}: Hugging Face's answer is not understood.") from None


def _check_answer(response: requests.Response, source: HuggingFaceRepo, token: str | None) -> None:
    status, code = response.status_code, response.headers.get("X-Error-Code", "")
    if status == 200:
        return
    if status == 401 and not code and response.headers.get("X-Error-Message") != WRONG_TOKEN:
        code = "RepoNotFound"  # as huggingface_hub reads it: a private repo looks like one that is not there
    if why := refusal_of(code, status, token):
        raise LoraError(f"{source.label} {why}.")
    if status == 429 or status >= 500:
        raise UnavailableError(f"{source.label}: Hugging Face answers {status}, try again later.", retry_after=0)
    raise LoraError(f"{source.label}: Hugging Face answers {status}.")


def _read_info(text: bytes) -> Info:
    """Raises one of the errors that `_model_info` expects for what is no such answer."""
    document = json.loads(text)
    commit = document.get("sha")
    if commit is not None and not re.fullmatch(r"[0-9a-f]{40}", commit):
        raise ValueError
    files = {}
    for sibling in document.get("siblings") or []:
        name, size, lfs = sibling["rfilename"], sibling.get("size"), sibling.get("lfs") or {}
        if not (isinstance(name, str) and isinstance(size, int | None)):
            raise TypeError
        sha256 = lfs.get("sha256")
        files[name] = File(size, None if sha256 is None else str(sha256))
    card = document.get("cardData")
    return Info(commit, files, card if isinstance(card, dict) else {})


def _licence(card: Mapping[str, Any]) -> str | None:
    """The licence that a repo's card names; its own name and address where it is none of the well-known ones
    (huggingface.co/docs/hub/repositories-licenses)."""
    known, name, link = (card.get(field) for field in ("license", "license_name", "license_link"))
    texts = clean(known if isinstance(known, list) else [known])
    if texts in ((), ("other",)):
        texts = clean([name]) or texts
    if texts and isinstance(link, str) and link.startswith("https://"):
        texts += clean([link])
    return ", ".join(texts) or None


def _choose_lora(source: HuggingFaceRepo, files: Files) -> str:
    names = _safetensors(files)
    name = choose_file(names)
    model = "model_index.json" in files or any(name.endswith(".safetensors.index.json") for name in files)
    if model and (name is None or name.rpartition("/")[2] not in KNOWN_NAMES):
        raise LoraError(f"{source.label} is a whole model, not a LoRA: name the repo of a LoRA.")
    if name is not None:
        return name
    at = f"resolve/{quote(source.revision, safe='')}/" if source.revision else ""
    hint = f"; name one, as in huggingface.co/{source.repo}/{at}{quote(min(names))}" if names else ""
    raise LoraError(f"{source.label} {_file_list(files)}{hint}.")


def _within(folder: str, files: Files) -> Files:
    """Those in a folder of the repo."""
    return {name: file for name, file in files.items() if not folder or name.startswith(f"{folder}/")}


def _file_list(files: Files) -> str:
    names = sorted(_safetensors(files))
    if not names:
        return "holds no .safetensors file"
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return f"holds {', '.join(map(shown, names[:MOST_NAMES]))}{more}"


def _safetensors(files: Files) -> list[str]:
    return [name for name in files if name.lower().endswith(".safetensors")]


def _parse(address: Address) -> HuggingFaceRepo | None:
    """huggingface.co/<owner>/<name>, then nothing, a file, or what a browser shows: /resolve, /blob, /raw, and /tree
    with a folder.

    ?weight_name= names the file as diffusers' `load_lora_weights` does, with ?subfolder= and ?revision=.
    """
    owner_and_name, rest = address.parts[:2], list(address.parts[2:])
    if len(owner_and_name) < 2 or owner_and_name[0] in NOT_OWNERS:
        return None
    if not all(re.fullmatch(r"[\w-][\w.-]*", part) for part in owner_and_name):
        return None
    repo, query = "/".join(owner_and_name), address.query
    revision, token = query.get("revision") or None, query.get("token") or None
    folder = rest[:1] == ["tree"] or bool(query.get("subfolder") and not query.get("weight_name"))
    if rest and rest[0] in ("resolve", "blob", "raw", "tree") and len(rest) > 1:
        revision, rest = rest[1], rest[2:] if rest[0] == "tree" else rest[2:] or [""]
    rest += filter(None, query.get("subfolder", "").split("/"))
    rest += query["weight_name"].split("/") if query.get("weight_name") else []
    path = "/".join(rest)
    if rest and ({"", ".", ".."} & {*rest} or not path.isprintable() or "\\" in path):
        return None
    if path.lower().endswith(".safetensors"):
        return HuggingFaceRepo(repo, revision, path, token)
    return HuggingFaceRepo(repo, revision, None, token, path) if folder or not rest else None


HUB = Hub(
    hosts=("huggingface.co", "hf.co"),
    accepted="huggingface.co/<owner>/<name> with or without /<file>.safetensors",
    parse=_parse,
)
