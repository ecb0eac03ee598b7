"""What each hub says of a source: which file it is, at which address, and what is known of it before it is fetched."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from urllib.parse import urljoin, urlsplit

import httpx2
import requests
from huggingface_hub import HfApi, get_token, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import ModelInfo, RepoSibling

from fetch.files import KNOWN_NAMES, choose_file, config_beside
from fetch.network import HubDownError, Pace, RetryError, Stop, open_once, open_url, retrying
from fetch.references import CivitaiModel, HuggingFaceRepo, ReplicateModel, WebFile
from fetch.remote import NotThereError, Remote, check_answer
from lora.errors import LoraError
from settings import Settings

MOST_JSON = 32 * 10**6
FLUX_1 = "flux.1"  # CivitAI's names of base models: "Flux.1 D", "Flux.1 S", "Flux.1 Krea", "Flux.1 Kontext"
LORA_TYPES = ("LORA", "LoCon", "DoRA")
MOST_NAMES = 8  # listed in one error

Json = dict[str, Any]
Ask = Callable[[str], Json]


def replicate_remote(
    source: ReplicateModel, settings: Settings, session: requests.Session, stop: Stop, pace: Pace
) -> Remote:
    """A model's `_weights` redirect to the tar that its training made; where to tells what the newest version is."""
    version = f"versions/{source.version}/" if source.version else ""
    url = f"{settings.replicate_endpoint}/{source.owner}/{source.name}/{version}_weights"
    remote = Remote(source.label, url, settings.replicate_api_token, "REPLICATE_API_TOKEN")
    if source.immutable:
        return remote
    headers = {"Authorization": f"Bearer {remote.token}"} if remote.token else {}

    def redirect() -> str | None:
        try:
            with stop.reading(open_once(session, url, headers, pace)) as response:
                target = session.get_redirect_target(response)
                if target is None:
                    check_answer(response, remote)
                return target
        except HubDownError as error:
            raise _retry(source.label, error) from None

    target = retrying(redirect, stop, pace)
    if target is None:
        return remote
    return replace(remote, identity=WebFile(urlsplit(urljoin(url, target))._replace(query="", fragment="").geturl()))


def hugging_face_remote(source: HuggingFaceRepo, settings: Settings, stop: Stop, pace: Pace) -> Remote:
    """The file at the commit that the revision is now, through Hugging Face's own client."""
    info = retrying(lambda: _model_info(source, settings, pace), stop, pace)
    files = {sibling.rfilename: sibling for sibling in info.siblings or []}
    name = source.file or _lora_of(source, files)
    if name not in files:
        raise LoraError(f"{source.label} does not exist: the repo {_file_list(source, files)}.")
    file, commit = files[name], info.sha or source.revision or "main"
    config = config_beside(name, files)

    def url(name: str) -> str:
        return hf_hub_url(source.repo, name, revision=commit, endpoint=settings.hf_endpoint)

    return Remote(
        source.label,
        url(name),
        settings.hf_token or get_token(),
        "HF_TOKEN",
        sha256=file.lfs.sha256 if file.lfs else None,
        size=file.size,
        identity=HuggingFaceRepo(source.repo, commit, name),
        config=url(config) if config else None,
    )


def civitai_remote(
    source: CivitaiModel, settings: Settings, session: requests.Session, stop: Stop, pace: Pace
) -> Remote:
    """The safetensors file of a version (developer.civitai.com, reference of models and model versions).

    A model's page stands for its newest version for FLUX.1. An id that is no model's is taken for a version's.
    """
    token = source.token or settings.civitai_api_token
    about = Remote(source.label, settings.civitai_endpoint, token, "CIVITAI_API_TOKEN")

    def ask(path: str) -> Json:
        url = f"{settings.civitai_endpoint}/api/v1/{path}"
        return retrying(lambda: _json(session, url, about, stop, pace), stop, pace)

    try:
        version = _civitai_version(source, ask)
        file = _civitai_file(version, source.label)
        number = int(version["id"])
        hashes = {str(kind).upper(): value for kind, value in (file.get("hashes") or {}).items()}
        sha256 = str(hashes["SHA256"]) if hashes.get("SHA256") else None
        query = urlsplit(str(file.get("downloadUrl") or "")).query  # which of a version's files it is
    except (KeyError, TypeError, AttributeError) as error:
        if isinstance(error, ValueError):
            raise
        raise LoraError(f"{source.label}: CivitAI's answer is not understood.") from None
    url = f"{settings.civitai_endpoint}/api/download/models/{number}" + (f"?{query}" if query else "")
    return replace(about, url=url, sha256=sha256, identity=CivitaiModel(None, number, source.token))


def _model_info(source: HuggingFaceRepo, settings: Settings, pace: Pace) -> ModelInfo:
    about, api = source.label, HfApi(endpoint=settings.hf_endpoint, token=settings.hf_token)
    try:
        return api.model_info(source.repo, revision=source.revision, files_metadata=True, timeout=pace.connect)
    except GatedRepoError:
        raise LoraError(
            f"{about} is gated: accept its licence on its page and set HF_TOKEN to a token of that account."
        ) from None
    except RepositoryNotFoundError:
        hint = "the HF_TOKEN that is set does not open it" if settings.hf_token else "HF_TOKEN is needed"
        raise NotThereError(f"{about}: Hugging Face has no such repo, or it is private and {hint}.") from None
    except RevisionNotFoundError:
        raise NotThereError(f"{about}: the repo has no such revision.") from None
    except HFValidationError:
        raise LoraError(f"{about}: that is not a valid name of a Hugging Face repo.") from None
    except OfflineModeIsEnabled:
        raise HubDownError(f"{about}: HF_HUB_OFFLINE is set, so Hugging Face is not asked.") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status == 429 or status >= 500:
            raise RetryError(f"{about}: Hugging Face answers {status}, try again later.") from None
        if status in (401, 403):
            hint = "the HF_TOKEN that is set does not open it" if settings.hf_token else "set HF_TOKEN"
            raise LoraError(
                f"{about} is private or needs an account (Hugging Face answers {status}); {hint}."
            ) from None
        raise LoraError(f"{about}: Hugging Face answers {status}.") from None
    except (httpx2.HTTPError, OSError):
        raise RetryError(f"{about}: Hugging Face cannot be reached.") from None


def _lora_of(source: HuggingFaceRepo, files: dict[str, RepoSibling]) -> str:
    names = [name for name in files if name.lower().endswith(".safetensors")]
    name = choose_file(names)
    whole = "model_index.json" in files or any(name.endswith(".safetensors.index.json") for name in files)
    if whole and (name is None or name.rpartition("/")[2] not in KNOWN_NAMES):
        raise LoraError(f"{source.label} is a whole model, not a LoRA: name the repo of a LoRA.")
    if name is not None:
        return name
    address = f"huggingface.co/{source.repo}/" + (f"resolve/{source.revision}/" if source.revision else "")
    hint = f"; name one, as in {address}{min(names)}" if names else ""
    raise LoraError(f"{source.label} {_file_list(source, files)}{hint}.")


def _file_list(source: HuggingFaceRepo, files: dict[str, RepoSibling]) -> str:
    names = sorted(name for name in files if name.lower().endswith(".safetensors"))
    if not names:
        return "holds no .safetensors file"
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return f"holds {', '.join(names[:MOST_NAMES])}{more}"


def _civitai_version(source: CivitaiModel, ask: Ask) -> Json:
    """The version that is meant; an error names what it is when that is not FLUX.1's."""
    if source.version is not None:
        versions = [ask(f"model-versions/{source.version}")]
        kind = versions[0].get("model", {}).get("type")
    else:
        try:
            page = ask(f"models/{source.model}")
            versions, kind = page["modelVersions"], page.get("type")
        except NotThereError:
            versions = [ask(f"model-versions/{source.model}")]
            kind = versions[0].get("model", {}).get("type")
    if kind and kind not in LORA_TYPES:
        raise LoraError(f"{source.label} is no LoRA: CivitAI lists it as {kind}.")
    bases = list(dict.fromkeys(str(version.get("baseModel")) for version in versions))
    fitting = [version for version in versions if str(version.get("baseModel")).lower().startswith(FLUX_1)]
    if not fitting:
        raise LoraError(f"{source.label} is for {', '.join(bases) or 'no base model at all'}, not for FLUX.1.")
    return max(fitting, key=lambda version: str(version.get("publishedAt") or version.get("createdAt") or ""))


def _civitai_file(version: Json, label: str) -> Json:
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


def _json(session: requests.Session, url: str, about: Remote, stop: Stop, pace: Pace) -> Json:
    try:
        answer = open_url(session, url, {"Accept": "application/json"}, about.token, pace)
        with stop.reading(answer) as response:
            check_answer(response, about)
            document = json.loads(response.raw.read(MOST_JSON))
    except HubDownError as error:
        raise _retry(about.label, error) from None
    except (requests.RequestException, OSError, ValueError) as error:
        if isinstance(error, LoraError):
            raise
        raise RetryError(f"{about.label}: CivitAI's answer is not understood.") from None
    if not isinstance(document, dict):
        raise LoraError(f"{about.label}: CivitAI's answer is not understood.")
    return document


def _retry(label: str, error: HubDownError) -> RetryError:
    if isinstance(error, RetryError):
        return error
    return RetryError(f"{label}: {error}")
