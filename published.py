"""The weights that are published on Hugging Face: which files of which repos are needed, and where a copy lies here."""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download

from service.hugging_face import FETCH_ERRORS, failure
from settings import SettingsError

log = logging.getLogger("flux-lora")

WEIGHTS = Path(__file__).parent / "weights"
OWN_PARTS = ("transformer", "scheduler")
SHARED_PARTS = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")  # the same in dev and schnell
REPO_ID = r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?"


@dataclass(frozen=True)
class Published:
    """What one repo has of use here. A copy in `folder` below `WEIGHTS` is used before the repo is asked."""

    variable: str  # of the environment, which names another folder or repo
    repo: str  # may end in @revision
    folder: str
    files: tuple[str, ...]  # patterns of what is needed, as `fnmatch` reads them
    licence: str
    gated: bool = False  # opens only to accounts that have accepted the licence on its page


def files_of(parts: Sequence[str]) -> tuple[str, ...]:
    """The patterns of these parts of a FLUX.1 repo. Beside them such a repo has all weights again in single files."""
    return tuple(f"{part}/*.{kind}" for part in parts for kind in ("json", "safetensors", "txt", "model"))


def repo_and_revision(reference: str) -> tuple[str, str | None]:
    """What stands before and after the @; without one the revision is the repo's main one, None."""
    repo, _, revision = reference.partition("@")
    return repo, revision or None


CHECKER_FILES = ("config.json", "preprocessor_config.json", "model.safetensors")
DEV = Published(
    "FLUX_DEV",
    "black-forest-labs/FLUX.1-dev",
    "FLUX.1-dev",
    files_of(OWN_PARTS + SHARED_PARTS),
    "non-commercial, by Black Forest Labs",
    gated=True,
)
SCHNELL = Published(
    "FLUX_SCHNELL",
    "black-forest-labs/FLUX.1-schnell",
    "FLUX.1-schnell",
    files_of(OWN_PARTS + SHARED_PARTS),
    "Apache-2.0",
)
# Its main revision holds a pickle alone; this one, of the same repo, has the weights as safetensors.
CONCEPTS = Published(
    "SAFETY_CONCEPTS",
    "CompVis/stable-diffusion-safety-checker@refs/pr/39",
    "stable-diffusion-safety-checker",
    CHECKER_FILES,
    "none named",
)
VIT = Published("SAFETY_VIT", "Falconsai/nsfw_image_detection", "nsfw_image_detection", CHECKER_FILES, "Apache-2.0")


def locate(published: Published, reference: str | None, token: str | None, weights: Path = WEIGHTS) -> Path:
    """The folder that has these weights: the one that `reference` names, which may be a repo (its id may end in
    `@revision`); without a reference the copy below `weights`, or else the files of the repo itself.

    What is fetched goes into Hugging Face's own cache and is never fetched twice. Raises `SettingsError` when there is
    no such thing or it cannot be fetched; it names the variable, or says where a copy would be found.
    """
    if reference is None:
        copy = weights / published.folder
        if copy.is_dir():
            return copy
        about = f"There is no folder {copy}, so its weights come from the Hugging Face repo {published.repo}"
        advice = "; script/weights, run before the image is built, would put them into that folder"
        return _fetch(published, published.repo, token, about, advice)
    folder = Path(reference).expanduser()
    if folder.is_dir():
        return folder
    if not re.fullmatch(REPO_ID, reference):
        raise SettingsError(
            f"The environment variable {published.variable} is {reference!r}, which is neither a folder here nor a "
            "Hugging Face repo id such as black-forest-labs/FLUX.1-dev."
        )
    about = f"The environment variable {published.variable} names the Hugging Face repo {reference}"
    return _fetch(published, reference, token, about, "")


def _fetch(published: Published, reference: str, token: str | None, about: str, advice: str) -> Path:
    repo, revision = repo_and_revision(reference)
    log.info("%s: fetching %s from Hugging Face", published.variable, reference)
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(published.files), token=token))
    except FETCH_ERRORS as error:
        raise SettingsError(f"{about}{failure(error, token)}{advice}.") from None
