"""`script/weights`: what is fetched and what is not, resumed after a break, checked, in folders that are then found."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from flux.checkpoints import find_checkpoints
from published import CONCEPTS, DEV, OWN_PARTS, SCHNELL, VIT, repo_and_revision
from settings import read_settings
from tests.web import Fault, Web, read_folder, serve
from tools import ROOT

CHECKER = {"config.json": b"{}", "preprocessor_config.json": b"{}", "model.safetensors": bytes(1000)}
TOKEN = "hf_opensesame"
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def dev(checkpoints: dict[str, Path]) -> dict[str, bytes]:
    """What is needed of dev, and on this hub of schnell."""
    return {name: body for name, body in read_folder(checkpoints["dev"]).items() if "/" in name}


@pytest.fixture
def web(dev: dict[str, bytes]) -> Iterator[Web]:
    """A hub with the four repos, each with more than is needed. dev is gated."""
    with serve(Web()) as web:
        for published in (DEV, SCHNELL):
            web.hugging_face(published.repo, dev | {"flux1.safetensors": b"all again", "ae.safetensors": b"again"})
        for published in (CONCEPTS, VIT):
            repo, revision = repo_and_revision(published.repo)
            web.hugging_face(repo, CHECKER | {"pytorch_model.bin": b"a pickle"}, revision=revision or "main")
        web.gated, web.tokens = {f"/{DEV.repo}/"}, {f"/{DEV.repo}/": TOKEN}
        yield web


def start(web: Web, folder: Path, *arguments: str, token: str = TOKEN) -> "subprocess.Popen[str]":
    """`script/weights` with `folder` as the caller's own, into the folder `w` there."""
    environment = {"HF_ENDPOINT": web.url, "HF_HOME": str(folder / "cache"), "HF_TOKEN": token, "HOME": str(folder)}
    return subprocess.Popen(
        [ROOT / "script" / "weights", *arguments, "--into", "w"],
        cwd=folder,
        env={"PATH": os.environ["PATH"], **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def weights(web: Web, folder: Path, *arguments: str, token: str = TOKEN, fails: bool = False) -> str:
    """What the command prints; its last line on standard error if it has to fail."""
    with start(web, folder, *arguments, token=token) as process:
        out, err = process.communicate(timeout=120)
    assert "Traceback" not in err
    assert bool(process.returncode) == fails, err
    return err.splitlines()[-1] if fails else out + err


def fetched(web: Web) -> list[str]:
    """What was downloaded since it was last asked, as repo/file."""
    names = [request.path.split("/", 5) for request in web.downloads()]
    web.asked.clear()
    return sorted(f"{parts[2]}/{parts[5]}" for parts in names)


def test_the_list_says_what_is_needed_and_fetches_nothing(web: Web, tmp_path: Path, dev: dict[str, bytes]) -> None:
    printed = weights(web, tmp_path, "--list", token="")
    assert fetched(web) == []
    assert not (tmp_path / "w").exists()
    assert f" {len(dev[TRANSFORMER]) / 1e6:.1f} MB  {TRANSFORMER}\n" in printed
    assert "from https://huggingface.co/black-forest-labs/FLUX.1-dev, licence: non-commercial" in printed
    assert "gated: accept the licence on that page and set HF_TOKEN" in printed
    assert printed.count(TRANSFORMER) == 2
    assert printed.count("vae/diffusion_pytorch_model.safetensors") == 1  # schnell takes dev's
    assert not any(name in printed for name in ("flux1", "ae.safetensors", "pytorch_model.bin"))


def test_what_is_needed_is_fetched_once_and_what_is_damaged_anew(
    web: Web, tmp_path: Path, dev: dict[str, bytes]
) -> None:
    weights(web, tmp_path)
    folder, own = tmp_path / "w", {name: body for name, body in dev.items() if name.startswith(OWN_PARTS)}
    wanted = {DEV.folder: dev, SCHNELL.folder: own, CONCEPTS.folder: CHECKER, VIT.folder: CHECKER}
    assert {each.name: read_folder(each) for each in folder.iterdir()} == wanted
    assert len(fetched(web)) == sum(map(len, wanted.values()))
    found = find_checkpoints(read_settings({"FLUX_DEMO": "0"}), folder)
    assert found == {"dev": folder / DEV.folder, "schnell": folder / SCHNELL.folder}

    file = folder / DEV.folder / TRANSFORMER
    file.write_bytes(bytes(file.stat().st_size))
    (folder / VIT.folder / "config.json").write_bytes(b"[]")
    (folder / SCHNELL.folder / TRANSFORMER).unlink()
    assert "w/FLUX.1-schnell: " in weights(web, tmp_path, "schnell", "--list")
    assert fetched(web) == []
    printed = weights(web, tmp_path)
    assert f"{DEV.folder}/{TRANSFORMER} is damaged and is fetched anew" in printed
    assert fetched(web) == [f"FLUX.1-dev/{TRANSFORMER}", f"FLUX.1-schnell/{TRANSFORMER}", f"{VIT.folder}/config.json"]
    assert {each.name: read_folder(each) for each in folder.iterdir()} == wanted


def test_without_dev_schnell_is_fetched_whole(web: Web, tmp_path: Path, dev: dict[str, bytes]) -> None:
    weights(web, tmp_path, "schnell")
    assert read_folder(tmp_path / "w" / SCHNELL.folder) == dev


def test_a_stopped_run_goes_on_where_it_was(web: Web, tmp_path: Path, dev: dict[str, bytes]) -> None:
    """And what it has left is not taken for the weights."""
    stuck = threading.Event()
    web.fault = Fault(only=TRANSFORMER, wait=stuck)
    with start(web, tmp_path, "dev") as process:
        while web.fault.times and process.poll() is None:
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)
        assert "Traceback" not in process.communicate(timeout=60)[1]
    stuck.set()
    assert process.returncode == 130
    first = fetched(web)
    assert f"FLUX.1-dev/{TRANSFORMER}" in first
    assert [each.name for each in (tmp_path / "w").iterdir()] == ["FLUX.1-dev.incomplete"]
    weights(web, tmp_path, "dev")
    again = fetched(web)
    assert set(first) & set(again) == {f"FLUX.1-dev/{TRANSFORMER}"}
    assert len(first) + len(again) == len(dev) + 1
    assert read_folder(tmp_path / "w" / DEV.folder) == dev


@pytest.mark.parametrize("times", [1, 2])
def test_what_arrives_damaged_is_fetched_anew_once(web: Web, tmp_path: Path, times: int) -> None:
    web.fault = Fault(times=times, only="model.safetensors", body=b"\1" * 1000)
    printed = weights(web, tmp_path, "checkers", fails=times == 2)
    if times == 1:
        assert read_folder(tmp_path / "w" / CONCEPTS.folder) == CHECKER
    else:
        assert printed == (
            "stable-diffusion-safety-checker/model.safetensors does not have the checksum that Hugging Face lists, 2 "
            "times in a row: something between here and there changes it."
        )
        assert not (tmp_path / "w" / CONCEPTS.folder).exists()


def test_each_refusal_is_one_sentence(web: Web, tmp_path: Path) -> None:
    assert weights(web, tmp_path, "dev", token="hf_wrong", fails=True) == (
        "FLUX.1-dev comes from the Hugging Face repo black-forest-labs/FLUX.1-dev, which is gated: accept its licence "
        "on its page and set HF_TOKEN to a token of that account."
    )
    tree = next(page for path, page in web.pages.items() if path.startswith(f"/api/models/{VIT.repo}/tree/"))
    tree[0]["size"] = 10**15
    sentence = weights(web, tmp_path, "checkers", fails=True)
    assert sentence.startswith(f"There is not enough room at {tmp_path}/w: 1000000.0 GB are to be fetched and ")
    assert fetched(web) == []
    web.pages.clear()
    assert "which cannot be opened: there is no such repo" in weights(web, tmp_path, "checkers", fails=True)
    assert weights(web, tmp_path, "shnell", fails=True).endswith(
        "error: there is no shnell; there are dev, schnell, checkers"
    )
