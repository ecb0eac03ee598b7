"""Where weights come from: folders, Hugging Face through its real client, the demo checkpoint as the last resort."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from flux.checkpoints import find_checkpoints, is_demo
from settings import SettingsError, read_settings
from tests.hub import Hub, serve

FIND = """
import json, logging, sys
logging.basicConfig(level=logging.INFO)
from flux.checkpoints import find_checkpoints
from settings import SettingsError, read_settings
try:
    print(json.dumps({name: str(folder) for name, folder in find_checkpoints(read_settings()).items()}))
except SettingsError as error:
    sys.exit(str(error))
"""


@pytest.fixture
def hub(checkpoints: dict[str, Path]) -> Iterator[Hub]:
    with serve(Hub({"acme/dev": checkpoints["dev"], "acme/schnell": checkpoints["schnell"]})) as hub:
        yield hub


def find(hub: Hub, cache: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    """`find_checkpoints` in a process of its own, since Hugging Face's client reads its variables when imported."""
    base = {"HF_ENDPOINT": hub.url, "HF_HOME": str(cache), "PATH": os.environ["PATH"], "HOME": str(cache)}
    return subprocess.run(
        [sys.executable, "-c", FIND], env=base | environment, capture_output=True, text=True, timeout=60, check=False
    )


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_repos_are_fetched_whole_and_once(hub: Hub, tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    (checkpoints["dev"] / "flux1-dev.safetensors").write_bytes(b"the same weights again, in one file")
    first = find(hub, tmp_path, FLUX_DEV="acme/dev", FLUX_SCHNELL="acme/schnell")
    assert first.returncode == 0, first.stderr
    folders = {name: Path(folder) for name, folder in json.loads(first.stdout).items()}
    for name in ("dev", "schnell"):
        wanted = {file: body for file, body in files_below(checkpoints[name]).items() if "/" in file}
        assert files_below(folders[name]) == wanted
    hub.fetched.clear()
    assert find(hub, tmp_path, FLUX_DEV="acme/dev", FLUX_SCHNELL="acme/schnell").stdout == first.stdout
    assert hub.fetched == []


def test_schnell_does_not_fetch_what_dev_has(hub: Hub, tmp_path: Path) -> None:
    hub.repos["acme/whole-schnell"] = hub.repos["acme/dev"]
    done = find(hub, tmp_path, FLUX_DEV="acme/dev", FLUX_SCHNELL="acme/whole-schnell")
    fetched = {entry.split("/")[2] for entry in hub.fetched if entry.startswith("acme/whole-schnell/")}
    assert fetched == {"transformer", "scheduler"}
    assert "the VAE and the text encoders are dev's and are not fetched again" in done.stderr


def test_a_broken_download_is_resumed(hub: Hub, tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    dev = tmp_path / "dev"
    shutil.copytree(checkpoints["dev"], dev)
    (dev / "vae" / "large.safetensors").write_bytes(os.urandom(25 * 10**6))  # the client writes 10 MB at a time
    hub.repos["acme/dev"], hub.cut_after = dev, 15 * 10**6
    done = find(hub, tmp_path / "cache", FLUX_DEV="acme/dev", FLUX_SCHNELL="acme/schnell")
    assert done.returncode == 0, done.stderr
    assert [entry for entry in hub.fetched if " bytes=1" in entry] == ["acme/dev/vae/large.safetensors bytes=10485760-"]
    fetched = files_below(Path(json.loads(done.stdout)["dev"]))
    assert all(body == (dev / name).read_bytes() for name, body in fetched.items())


def test_the_cache_serves_when_the_hub_is_down(hub: Hub, tmp_path: Path) -> None:
    names = {"FLUX_DEV": "acme/dev", "FLUX_SCHNELL": "acme/schnell"}
    first = find(hub, tmp_path, **names)
    hub.failing = 503
    assert find(hub, tmp_path, **names, HF_HUB_OFFLINE="1").stdout == first.stdout


def test_a_gated_repo_opens_with_the_token(hub: Hub, tmp_path: Path) -> None:
    hub.gated, hub.token = {"acme/dev"}, "hf_opensesame"
    names = {"FLUX_DEV": "acme/dev", "FLUX_SCHNELL": "acme/schnell"}
    refused = find(hub, tmp_path, **names, HF_TOKEN="hf_wrong")
    assert refused.stderr.strip().splitlines()[-1] == (
        "The environment variable FLUX_DEV names the Hugging Face repo acme/dev, which is gated: accept its licence on "
        "its page and set HF_TOKEN to a token of that account."
    )
    assert "hf_wrong" not in refused.stderr
    assert find(hub, tmp_path, **names, HF_TOKEN="hf_opensesame").returncode == 0


@pytest.mark.parametrize(
    ("reference", "complaint"),
    [
        ("acme/nothing", "there is no such repo, or it is private"),
        ("./nowhere", "neither a folder here nor a Hugging Face repo id"),
        ("/nowhere", "neither a folder here nor a Hugging Face repo id"),
        ("acme/dev/main", "neither a folder here nor a Hugging Face repo id"),
        ("acme--x/dev", "not a valid repo id"),
    ],
)
def test_what_is_no_checkpoint_is_one_sentence(hub: Hub, tmp_path: Path, reference: str, complaint: str) -> None:
    done = find(hub, tmp_path, FLUX_DEV=reference)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("The environment variable FLUX_DEV ")
    assert complaint in last
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("offline", "status"), [("1", None), ("0", 500)])
def test_a_hub_out_of_reach_is_one_sentence(hub: Hub, tmp_path: Path, offline: str, status: int | None) -> None:
    hub.failing = status
    done = find(hub, tmp_path, FLUX_DEV="acme/dev", HF_HUB_OFFLINE=offline)
    assert "Hugging Face cannot be reached" in done.stderr.strip().splitlines()[-1]


def test_folders_are_taken_as_they_are(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    named = {"FLUX_DEV": str(checkpoints["dev"]), "FLUX_SCHNELL": str(checkpoints["schnell"])}
    assert find_checkpoints(read_settings(named)) == checkpoints
    for model, folder in checkpoints.items():
        (tmp_path / f"FLUX.1-{model}").symlink_to(folder)
    found = find_checkpoints(read_settings({}), weights=tmp_path)
    assert {name: folder.resolve() for name, folder in found.items()} == checkpoints
    assert not any(map(is_demo, found.values()))


@pytest.mark.parametrize("part", ["transformer", "vae", "tokenizer_2"])
def test_a_folder_that_lacks_a_part_is_named(checkpoints: dict[str, Path], tmp_path: Path, part: str) -> None:
    dev = tmp_path / "dev"
    shutil.copytree(checkpoints["dev"], dev)
    shutil.rmtree(dev / part)
    with pytest.raises(SettingsError, match=f"FLUX_DEV leads to .* it has no folder {part}"):
        find_checkpoints(read_settings({"FLUX_DEV": str(dev)}))


def test_without_weights_it_is_the_demo_model_and_said(caplog: pytest.LogCaptureFixture) -> None:
    found = find_checkpoints(read_settings({}))
    assert {name: is_demo(folder) for name, folder in found.items()} == {"dev": True, "schnell": True}
    for model in found:
        assert f"{model.upper()} IS THE DEMO MODEL" in caplog.text


def test_without_even_the_demo_model_it_says_what_to_set(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="There are no weights of dev: set FLUX_DEV to a folder"):
        find_checkpoints(read_settings({}), weights=tmp_path)


def test_a_real_schnell_borrows_nothing_from_the_demo_dev(checkpoints: dict[str, Path]) -> None:
    with pytest.raises(SettingsError, match=r"FLUX_SCHNELL leads to .* it has no folder vae"):
        find_checkpoints(read_settings({"FLUX_SCHNELL": str(checkpoints["schnell"])}))
