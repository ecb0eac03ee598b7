"""Where the weights of dev and schnell are: a folder, a Hugging Face repo fetched first, or the demo checkpoint."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from published import DEV, OWN_PARTS, SCHNELL, SHARED_PARTS, WEIGHTS, Published, files_of, locate
from settings import Settings, SettingsError

log = logging.getLogger("flux-lora")

MODELS = {"dev": DEV, "schnell": SCHNELL}


def find_checkpoints(settings: Settings, weights: Path = WEIGHTS) -> dict[str, Path]:
    """The folder of each model, in diffusers layout and complete but for what schnell may take from dev.

    For each in turn: `FLUX_DEV` / `FLUX_SCHNELL`, then `weights/FLUX.1-dev` / `weights/FLUX.1-schnell`, then the demo
    checkpoint, `weights/demo-dev` / `weights/demo-schnell`; with `FLUX_DEMO` off the Hugging Face repos in its place.
    Raises `SettingsError` when what was asked for is not there or is no FLUX.1 checkpoint.
    """
    references = {"dev": settings.flux_dev, "schnell": settings.flux_schnell}
    folders: dict[str, Path] = {}
    for model, published in MODELS.items():
        reference = references[model]
        if reference is None and settings.flux_demo and not (weights / published.folder).is_dir():
            folders[model] = _demo(model, published.variable, weights)
        else:
            borrows = "dev" in folders and not is_demo(folders["dev"])
            needed = _own_part(published, reference, weights) if borrows else published
            folders[model] = locate(needed, reference, settings.hf_token, weights)
        _check_layout(folders, model, published.variable)
        log.info("%s: %s", model, folders[model])
    return folders


def is_demo(folder: Path) -> bool:
    """Whether the folder holds one of the demo models."""
    return folder.name in {f"demo-{model}" for model in MODELS}


def _own_part(published: Published, reference: str | None, weights: Path) -> Published:
    """What is needed of a model that takes the parts which it shares from dev."""
    folder = Path(reference).expanduser() if reference else weights / published.folder
    if not folder.is_dir():
        named = reference or published.repo
        log.info("%s: the VAE and the text encoders are dev's and are not fetched again", named)
    return replace(published, files=files_of(OWN_PARTS))


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
