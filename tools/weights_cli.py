"""Fetch the weights that are needed into weights/, check them, and fetch anew what is damaged.

A folder gets its name when it is whole, so one that a stopped run has left is never taken for the weights.
"""

import argparse
import hashlib
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.hf_api import RepoFile
from tqdm import tqdm

from published import CONCEPTS, DEV, OWN_PARTS, SCHNELL, VIT, WEIGHTS, Published, files_of, repo_and_revision
from service.hugging_face import FETCH_ERRORS, failure
from settings import GB, MB, Settings, SettingsError, read_settings

NAMES = {"dev": (DEV,), "schnell": (SCHNELL,), "checkers": (CONCEPTS, VIT)}
INCOMPLETE = ".incomplete"
MOST_FETCHES = 2  # of a file that arrives damaged
KEPT_FREE = GB  # bytes of the disk


class WeightsError(RuntimeError):
    """The weights could not be fetched; the message is one sentence."""


@dataclass(frozen=True)
class Plan:
    """What is to be in one folder: the files of a repo at one commit."""

    published: Published
    folder: Path
    commit: str
    files: tuple[RepoFile, ...]

    @property
    def home(self) -> Path:
        """Where the files are until the folder is whole."""
        return self.folder if self.folder.is_dir() else self.folder.with_name(self.folder.name + INCOMPLETE)

    def missing(self) -> list[RepoFile]:
        """The files that are not there, or not in their full length."""
        return [file for file in self.files if not _has_size(self.home / file.path, file)]


def main() -> int:
    """Returns the exit code: 0 when everything is there."""
    parser = argparse.ArgumentParser(prog="script/weights", description=__doc__)
    parser.add_argument("names", metavar="NAME", nargs="*", help="dev, schnell, checkers (default: all)")
    parser.add_argument("--list", action="store_true", help="print the files and their sizes, and fetch nothing")
    parser.add_argument("--into", metavar="DIR", type=Path, default=WEIGHTS, help="another folder than weights/")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.names if name not in NAMES]:
        parser.error(f"there is no {unknown[0]}; there are {', '.join(NAMES)}")
    try:
        settings = read_settings()
        plans = [_plan(each, arguments.into, settings) for each in _needed(arguments.names or NAMES, arguments.into)]
        for plan in plans:
            _describe(plan, with_files=arguments.list)
        _check_disk(plans, arguments.into, only_warn=arguments.list)
        if not arguments.list:
            for plan in plans:
                _fetch(plan, settings)
    except (WeightsError, SettingsError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _needed(names: Iterable[str], into: Path) -> list[Published]:
    """The repos behind the names. Where dev is, schnell is only what it does not share with dev."""
    repos = [published for name in NAMES if name in names for published in NAMES[name]]
    has_dev = DEV in repos or (into / DEV.folder).is_dir()
    return [replace(each, files=files_of(OWN_PARTS)) if each is SCHNELL and has_dev else each for each in repos]


def _plan(published: Published, into: Path, settings: Settings) -> Plan:
    repo, revision = repo_and_revision(published.repo)
    api = HfApi(token=settings.hf_token)
    try:
        commit = api.repo_info(repo, revision=revision).sha
        tree = list(api.list_repo_tree(repo, recursive=True, revision=commit))
    except FETCH_ERRORS as error:
        raise _error(published, error, settings) from None
    files = [entry for entry in tree if isinstance(entry, RepoFile)]
    needed = tuple(file for file in files if any(fnmatch(file.path, pattern) for pattern in published.files))
    if commit is None or not needed:
        raise WeightsError(f"The Hugging Face repo {published.repo} has none of the files that are needed.")
    return Plan(published, into / published.folder, commit, needed)


def _error(published: Published, error: Exception, settings: Settings) -> WeightsError:
    about = f"{published.folder} comes from the Hugging Face repo {published.repo}"
    return WeightsError(f"{about}{failure(error, settings.hf_token)}.")


def _describe(plan: Plan, *, with_files: bool) -> None:
    published, missing = plan.published, plan.missing()
    repo, _ = repo_and_revision(published.repo)
    state = f"{_size(missing)} to fetch" if missing else "there"
    print(f"{plan.folder}: {_size(plan.files)} in {len(plan.files)} files, {state}")
    print(f"  from https://huggingface.co/{repo}, licence: {published.licence}")
    if published.gated and missing:
        print("  gated: accept the licence on that page and set HF_TOKEN to a token of that account")
    if with_files:
        for file in plan.files:
            mark = "" if file in missing else "  (there)"
            print(f"  {_size([file]):>10}  {file.path}{mark}")


def _check_disk(plans: Sequence[Plan], into: Path, *, only_warn: bool) -> None:
    missing = [file for plan in plans for file in plan.missing()]
    place = next(folder for folder in (into.absolute(), *into.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(place).free
    print(f"To fetch: {_size(missing)}; free at {place}: {free / GB:.1f} GB.", flush=True)
    if not only_warn and missing and sum(file.size for file in missing) + KEPT_FREE > free:
        raise WeightsError(
            f"There is not enough room at {place}: {_size(missing)} are to be fetched and {free / GB:.1f} GB are free."
        )


def _fetch(plan: Plan, settings: Settings) -> None:
    """Have every file of the plan in its folder, with the checksum that the repo lists."""
    wrong = _damaged(plan, plan.files)
    for _ in range(MOST_FETCHES):
        if not wrong:
            break
        _download(plan, wrong, settings)
        wrong = _damaged(plan, wrong)
    if wrong:
        raise WeightsError(
            f"{plan.published.folder}/{wrong[0].path} does not have the checksum that Hugging Face lists, "
            f"{MOST_FETCHES} times in a row: something between here and there changes it."
        )
    shutil.rmtree(plan.home / ".cache", ignore_errors=True)  # the client's notes, and what a killed run has left
    if plan.home != plan.folder:
        plan.home.rename(plan.folder)
    print(f"{plan.folder} is whole.", flush=True)


def _damaged(plan: Plan, files: Iterable[RepoFile]) -> list[RepoFile]:
    """Those of the files that are not there or have another checksum; the latter are deleted."""
    wrong = []
    there = [file for file in files if (plan.home / file.path).exists()]
    for file in tqdm(there, desc=f"checking {plan.published.folder}", unit="file", disable=not there):
        if not _is_whole(plan.home / file.path, file):
            print(f"{plan.published.folder}/{file.path} is damaged and is fetched anew", file=sys.stderr)
            (plan.home / file.path).unlink()
            wrong.append(file)
    return wrong + [file for file in files if file not in there]


def _download(plan: Plan, files: Sequence[RepoFile], settings: Settings) -> None:
    """One file after another, so that a stop costs no more than the one that is arriving."""
    repo, _ = repo_and_revision(plan.published.repo)
    token = settings.hf_token
    try:
        for file in files:
            hf_hub_download(repo, file.path, revision=plan.commit, local_dir=plan.home, token=token)
    except FETCH_ERRORS as error:
        raise _error(plan.published, error, settings) from None


def _has_size(path: Path, file: RepoFile) -> bool:
    return path.is_file() and path.stat().st_size == file.size


def _is_whole(path: Path, file: RepoFile) -> bool:
    """A large file's checksum is SHA-256; of a small one the repo lists git's, SHA-1 over a header and the content."""
    if not _has_size(path, file):
        return False
    if file.lfs is None:
        content = path.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == file.blob_id
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() == file.lfs.sha256


def _size(files: Iterable[RepoFile]) -> str:
    size = sum(file.size for file in files)
    return f"{size / GB:.1f} GB" if size >= GB else f"{size / MB:.1f} MB"


if __name__ == "__main__":
    sys.exit(main())
