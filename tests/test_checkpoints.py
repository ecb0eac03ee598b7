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
from published import DEV, WEIGHTS
from settings import SettingsError, read_settings
from tests.web import COMMIT, Fault, Web, read_folder, serve

FIND = """
import json, logging, sys
logging.basicConfig(level=logging.INFO)
from flux.checkpoints import find_checkpoints
from settings import SettingsError, read_settings
from published import WEIGHTS
from pathlib import Path
try:
    found = find_checkpoints(read_settings(), Path(*sys.argv[1:]) if sys.argv[1:] else WEIGHTS)
    print(json.dumps({name: str(folder) for name, folder in found.items()}))
except SettingsError as error:
    sys.exit(str(error))
"""


@pytest.fixture
def web(checkpoints: dict[str, Path]) -> Iterator[Web]:
    with serve(Web()) as web:
        for model, folder in checkpoints.items():
            web.hugging_face(f"acme/{model}", read_folder(folder))
        yield web


def find(web: Web, cache: Path, *weights: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    """`find_checkpoints` in a process of its own, since Hugging Face's client reads its variables when imported."""
    base = {"HF_ENDPOINT": web.url, "HF_HOME": str(cache), "PATH": os.environ["PATH"], "HOME": str(cache)}
    return subprocess.run(
        [sys.executable, "-c", FIND, *weights],
        env=base | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_repos_are_fetched_whole_and_once(web: Web, tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    again = {"flux1-dev.safetensors": b"the same weights again, in one file"}
    web.hugging_face("acme/dev", read_folder(checkpoints["dev"]) | again)
    first = find(web, tmp_path, FLUX_DEV="acme/dev", FLUX_SCHNELL="acme/schnell")
    assert first.returncode == 0, first.stderr
    folders = {name: Path(folder) for name, folder in json.loads(first.stdout).items()}
    for name in ("dev", "schnell"):
        wanted = {file: body for file, body in read_folder(checkpoints[name]).items() if "/" in file}
        assert read_folder(folders[name]) == wanted
    web.asked.clear()
    assert find(web, tmp_path, FLUX_DEV="acme/dev", FLUX_SCHNELL="acme/schnell").stdout == first.stdout
    assert web.downloads() == []


def test_schnell_does_not_fetch_what_dev_has(web: Web, tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    web.hugging_face("acme/whole-schnell", read_folder(checkpoints["dev"]))
    done = find(web, tmp_path, FLUX_DEV="acme/dev", FLUX_SCHNELL="acme/whole-schnell")
    start = f"/acme/whole-schnell/resolve/{COMMIT}/"
    fetched = {
        request.path.removeprefix(start).split("/")[0] for request in web.downloads() if request.path.startswith(start)
    }
    assert fetched == {"transformer", "scheduler"}
    assert "the VAE and the text encoders are dev's and are not fetched again" in done.stderr


def test_a_broken_download_is_resumed(web: Web, tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    dev = read_folder(checkpoints["dev"]) | {"vae/large.safetensors": os.urandom(25 * 10**6)}
    web.hugging_face("acme/dev", dev)
    web.fault = Fault(only="large.safetensors", cut_after=15 * 10**6)
    done = find(web, tmp_path / "cache", FLUX_DEV="acme/dev", FLUX_SCHNELL="acme/schnell")
    assert done.returncode == 0, done.stderr
    ranges = [request.headers.get("Range") for request in web.downloads() if request.path.endswith("large.safetensors")]
    assert ranges[1:] == ["bytes=10485760-"]  # the client writes 10 MB at a time
    fetched = read_folder(Path(json.loads(done.stdout)["dev"]))
    assert fetched.items() <= dev.items()
    assert "vae/large.safetensors" in fetched


def test_the_cache_serves_when_the_hub_is_down(web: Web, tmp_path: Path) -> None:
    names = {"FLUX_DEV": "acme/dev", "FLUX_SCHNELL": "acme/schnell"}
    first = find(web, tmp_path, **names)
    web.failing = 503
    assert find(web, tmp_path, **names, HF_HUB_OFFLINE="1").stdout == first.stdout


def test_a_gated_repo_opens_with_the_token(web: Web, tmp_path: Path) -> None:
    web.gated, web.tokens = {"/acme/dev/"}, {"/acme/dev/": "hf_opensesame"}
    names = {"FLUX_DEV": "acme/dev", "FLUX_SCHNELL": "acme/schnell"}
    refused = find(web, tmp_path, **names, HF_TOKEN="hf_wrong")
    assert refused.stderr.strip().splitlines()[-1] == (
        "The environment variable FLUX_DEV names the Hugging Face repo acme/dev, which is gated: accept its licence on "
        "its page and set HF_TOKEN to a token of that account."
    )
    assert "hf_wrong" not in refused.stderr
    assert find(web, tmp_path, **names, HF_TOKEN="hf_opensesame").returncode == 0


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
def test_what_is_no_checkpoint_is_one_sentence(web: Web, tmp_path: Path, reference: str, complaint: str) -> None:
    done = find(web, tmp_path, FLUX_DEV=reference)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("The environment variable FLUX_DEV ")
    assert complaint in last
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("offline", "status"), [("1", None), ("0", 500)])
def test_a_hub_out_of_reach_is_one_sentence(web: Web, tmp_path: Path, offline: str, status: int | None) -> None:
    web.failing = status
    done = find(web, tmp_path, FLUX_DEV="acme/dev", HF_HUB_OFFLINE=offline)
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


def test_without_the_demo_model_what_is_not_there_is_fetched(
    web: Web, tmp_path: Path, checkpoints: dict[str, Path]
) -> None:
    """As in the container; a folder in weights/ comes first, and the demo model is used only where it is named."""
    (tmp_path / "FLUX.1-schnell").symlink_to(checkpoints["schnell"])
    demos = {f"demo-{model}": WEIGHTS / f"demo-{model}" for model in checkpoints}
    for name, folder in demos.items():
        (tmp_path / name).symlink_to(folder)
    refused = find(web, tmp_path / "cache", tmp_path, FLUX_DEMO="0")
    assert refused.stderr.strip().splitlines()[-1] == (
        f"There is no folder {tmp_path}/FLUX.1-dev, so its weights come from the Hugging Face repo "
        "black-forest-labs/FLUX.1-dev, which cannot be opened: there is no such repo, or it is private and HF_TOKEN is "
        "needed; script/weights, run before the image is built, would put them into that folder."
    )
    web.hugging_face(DEV.repo, read_folder(checkpoints["dev"]))
    found = json.loads(find(web, tmp_path / "cache", tmp_path, FLUX_DEMO="0").stdout)
    assert Path(found["dev"]).is_relative_to(tmp_path / "cache")
    assert found["schnell"] == str(tmp_path / "FLUX.1-schnell")
    named = {"FLUX_DEMO": "0", "FLUX_DEV": str(demos["demo-dev"]), "FLUX_SCHNELL": str(demos["demo-schnell"])}
    assert all(map(is_demo, find_checkpoints(read_settings(named), tmp_path).values()))
