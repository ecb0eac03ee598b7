"""Hugging Face: a repo at a branch, tag or commit holds files, one of which is the LoRA."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import quote

import httpx2
from huggingface_hub import HfApi, get_token, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.hf_api import ModelInfo, RepoSibling

from fetch.errors import UnavailableError
from fetch.files import KNOWN_NAMES, choose_file, config_beside
from fetch.hub import Address, Hub, Source
from fetch.network import Client
from fetch.remote import RemoteFile
from fetch.trigger_words import of_card
from hugging_face_errors import refusal
from lora.errors import LoraError
from settings import Settings

NOT_OWNERS = ("api", "collections", "datasets", "docs", "models", "spaces")  # first parts of its other pages
MOST_NAMES = 8  # listed in one error

Files = Mapping[str, RepoSibling]


@dataclass(frozen=True)
class HuggingFaceRepo(Source):
    """A repo, at a branch, tag or commit (None: main), and a file of it (None: the one that is the LoRA). The token is
    one that was in the pasted address."""

    repo: str
    revision: str | None = None
    file: str | None = None
    token: str | None = field(default=None, repr=False)

    @property
    def identity(self) -> tuple[object, ...]:
        return (self.repo, self.revision, self.file, *([self.token] if self.token else []))

    @property
    def label(self) -> str:
        at = f"@{self.revision}" if self.revision else ""
        return f"huggingface.co/{self.repo}{at}" + (f"/{self.file}" if self.file else "")

    @property
    def immutable(self) -> bool:
        return re.fullmatch(r"[0-9a-f]{40}", self.revision or "") is not None

    def endpoint(self, settings: Settings) -> str:
        return settings.hf_endpoint

    def resolve(self, settings: Settings, client: Client) -> RemoteFile:
        """The file at the commit that the revision is now."""
        info = client.retrying(lambda: _model_info(self, settings, client.limits.connect_timeout))
        files = {sibling.rfilename: sibling for sibling in info.siblings or []}
        name = self.file or _choose_lora(self, files)
        if name not in files:
            raise LoraError(f"{self.label} does not exist: the repo {_file_list(files)}.")
        file, commit = files[name], info.sha or self.revision or "main"
        config = config_beside(name, files)

        def url(name: str) -> str:
            return hf_hub_url(self.repo, name, revision=commit, endpoint=settings.hf_endpoint)

        return RemoteFile(
            self.label,
            url(name),
            self.token or settings.hf_token or get_token(),
            "HF_TOKEN",
            sha256=file.lfs.sha256 if file.lfs else None,
            size=file.size,
            key=HuggingFaceRepo(self.repo, commit, name, self.token).key,
            config_url=url(config) if config else None,
            trigger_words=of_card(vars(info.card_data)) if info.card_data else (),
        )


def _model_info(source: HuggingFaceRepo, settings: Settings, timeout: float) -> ModelInfo:
    """Asked through Hugging Face's own client. Raises `LoraError`."""
    token = source.token or settings.hf_token
    api = HfApi(endpoint=settings.hf_endpoint, token=token)
    try:
        return api.model_info(source.repo, revision=source.revision, files_metadata=True, timeout=timeout)
    except OfflineModeIsEnabled:
        raise UnavailableError(f"{source.label}: HF_HUB_OFFLINE is set, so Hugging Face is not asked.") from None
    except HFValidationError as error:
        raise LoraError(f"{source.label} {refusal(error, token)}.") from None
    except HfHubHTTPError as error:
        if why := refusal(error, token):
            raise LoraError(f"{source.label} {why}.") from None
        status = error.response.status_code
        if status == 429 or status >= 500:
            raise UnavailableError(
                f"{source.label}: Hugging Face answers {status}, try again later.", retry_after=0
            ) from None
        raise LoraError(f"{source.label}: Hugging Face answers {status}.") from None
    except (httpx2.HTTPError, OSError):
        raise UnavailableError(f"{source.label}: Hugging Face cannot be reached.", retry_after=0) from None


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


def _file_list(files: Files) -> str:
    names = sorted(_safetensors(files))
    if not names:
        return "holds no .safetensors file"
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return f"holds {', '.join(names[:MOST_NAMES])}{more}"


def _safetensors(files: Files) -> list[str]:
    return [name for name in files if name.lower().endswith(".safetensors")]


def _parse(address: Address) -> HuggingFaceRepo | None:
    """huggingface.co/<owner>/<name>, then nothing, a file, or what a browser shows: /resolve, /blob, /raw and /tree.

    ?weight_name= names the file as diffusers' `load_lora_weights` does, with ?subfolder= and ?revision=.
    """
    owner_and_name, rest = address.parts[:2], list(address.parts[2:])
    if len(owner_and_name) < 2 or owner_and_name[0] in NOT_OWNERS:
        return None
    if not all(re.fullmatch(r"[\w-][\w.-]*", part) for part in owner_and_name):
        return None
    repo, query = "/".join(owner_and_name), address.query
    revision, token = query.get("revision") or None, query.get("token") or None
    if rest and rest[0] in ("resolve", "blob", "raw", "tree") and len(rest) > 1:
        revision, rest = rest[1], rest[2:] if rest[0] == "tree" else rest[2:] or [""]
    if query.get("weight_name"):
        rest = [*rest, *filter(None, query.get("subfolder", "").split("/")), *query["weight_name"].split("/")]
    file = "/".join(rest)
    safe = not {"", ".", ".."} & {*rest} and file.isprintable() and "\\" not in file
    if rest and not (safe and file.lower().endswith(".safetensors")):
        return None
    return HuggingFaceRepo(repo, revision, file or None, token)


HUB = Hub(
    hosts=("huggingface.co", "hf.co"),
    accepted="huggingface.co/<owner>/<name> with or without /<file>.safetensors",
    parse=_parse,
)
