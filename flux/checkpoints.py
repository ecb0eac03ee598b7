"""Where the weights of dev and schnell are: a folder, a Hugging Face repo fetched first, or the demo checkpoint."""

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from service.hugging_face import refusal
from settings import Settings, SettingsError

log = logging.getLogger("flux-lora")

MODELS = ("dev", "schnell")
WEIGHTS = Path(__file__).parent.parent / "weights"
OWN_PARTS = ("transformer", "scheduler")
SHARED_PARTS = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")  # the same in dev and schnell


def find_checkpoints(settings: Settings, weights: Path = WEIGHTS) -> dict[str, Path]:
    """The folder of each model, in diffusers layout and complete but for what schnell may take from dev.

    For each in turn: `FLUX_DEV` / `FLUX_SCHNELL`, then `weights/FLUX.1-dev` / `weights/FLUX.1-schnell`, then the demo
    checkpoint, `weights/demo-dev` / `weights/demo-schnell`. Raises `SettingsError` when what was
    asked for is not there or is no FLUX.1 checkpoint.
    """
    references = {"dev": settings.flux_dev, "schnell": settings.flux_schnell}
    folders: dict[str, Path] = {}
    for model in MODELS:
        variable, reference = f"FLUX_{model.upper()}", references[model]
        default = weights / f"FLUX.1-{model}"
        borrows = "dev" in folders and not is_demo(folders["dev"])
        if reference is not None:
            folders[model] = resolve_folder(reference, variable, settings.hf_token, _wanted(reference, borrows))
        elif default.is_dir():
            folders[model] = default
        else:
            folders[model] = _demo(model, variable, weights)
        _check_layout(folders, model, variable)
        log.info("%s: %s", model, folders[model])
    return folders


def is_demo(folder: Path) -> bool:
    """Whether the folder holds one of the demo models."""
    return folder.name in {f"demo-{model}" for model in MODELS}


def resolve_folder(reference: str, variable: str, token: str | None, wanted: Sequence[str]) -> Path:
    """The folder that `reference` names: one that is here, or a Hugging Face repo's files that match `wanted`.

    A repo id may end in `@revision`. The files go into Hugging Face's own cache, resumed after a break and never
    fetched twice. Raises `SettingsError`, which names `variable`, when there is no such thing or it cannot be fetched.
    """
    folder = Path(reference).expanduser()
    if folder.is_dir():
        return folder
    match = re.fullmatch(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w./-]+))?", reference)
    if not match:
        raise SettingsError(
            f"The environment variable {variable} is {reference!r}, which is neither a folder here nor a Hugging Face "
            "repo id such as black-forest-labs/FLUX.1-dev."
        )
    repo, revision = match.groups()
    log.info("%s: fetching %s from Hugging Face", variable, reference)
    about = f"The environment variable {variable} names the Hugging Face repo {reference}"
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(wanted), token=token))
    except LocalEntryNotFoundError:
        raise SettingsError(
            f"{about}, but Hugging Face cannot be reached and its files are not all in the cache."
        ) from None
    except HFValidationError as error:
        raise SettingsError(f"{about}, which {refusal(error, token)}.") from None
    except HfHubHTTPError as error:
        if why := refusal(error, token):
            raise SettingsError(f"{about}, which {why}.") from None
        raise SettingsError(f"{about}, but Hugging Face answered {error.response.status_code}.") from None
    except OSError as error:
        raise SettingsError(f"{about}, but fetching it failed: {error.strerror or type(error).__name__}.") from None


def _wanted(reference: str, borrows: bool) -> list[str]:
    """The files of a FLUX.1 repo that are to be fetched."""
    if borrows and not Path(reference).expanduser().is_dir():
        log.info("%s: the VAE and the text encoders are dev's and are not fetched again", reference)
    parts = OWN_PARTS if borrows else OWN_PARTS + SHARED_PARTS
    return [f"{part}/*.{kind}" for part in parts for kind in ("json", "safetensors", "txt", "model")]


def _check_layout(folders: Mapping[str, Path], model: str, variable: str) -> None:
    """Say what is missing before anything is loaded."""
    for part in OWN_PARTS + SHARED_PARTS:
        homes = [folders[model]]
        if part in SHARED_PARTS and is_demo(folders["dev"]) == is_demo(folders[model]):
            homes.append(folders["dev"])
        if not any((home / part).is_dir() for home in homes):
            raise SettingsError(
                f"The environment variable {variable} leads to {folders[model]}, which is not a FLUX.1 checkpoint in "
                f"diffusers layout: it has no folder {part}."
            )


def _demo(model: str, variable: str, weights: Path) -> Path:
    folder = weights / f"demo-{model}"
    if not folder.is_dir():
        raise SettingsError(
            f"There are no weights of {model}: set {variable} to a folder in diffusers layout or a Hugging Face repo "
            f"id, or put them into weights/FLUX.1-{model}."
        )
    log.warning(
        "%s IS THE DEMO MODEL, WHICH DRAWS NOTHING BUT PLAIN SHAPES: %s is not set and weights/FLUX.1-%s is not there.",
        model.upper(),
        variable,
        model,
    )
    return folder
