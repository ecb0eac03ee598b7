"""The commands of the README, run as a newcomer runs them."""

import io
import json
import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from PIL import Image

from bench._common import Goal, judge
from tools import ROOT
from tools.receiver import receiver
from tools.server import ServerError, predict


@pytest.fixture
def environment(checkpoints: dict[str, Path]) -> dict[str, str]:
    return {**os.environ, **{f"FLUX_{model.upper()}": str(folder) for model, folder in checkpoints.items()}}


LIGHT = ("-e", "COG_PREDICT_TYPE_STUB=tests/light.py:Predictor")  # models are no matter of most of these tests


def script(
    name: str, *arguments: str | Path, environment: dict[str, str], folder: Path, stdin: str = ""
) -> "subprocess.CompletedProcess[str]":
    command: Sequence[str | Path] = [ROOT / "script" / name, *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment, input=stdin, capture_output=True, text=True, check=False
    )


def test_predict_saves_the_pictures_beside_the_caller(
    environment: dict[str, str], tmp_path: Path, photo: Image.Image
) -> None:
    photo.save(tmp_path / "photo.png")
    done = script(
        "predict", *LIGHT, "-i", "prompt=a cat", "-i", "image=@photo.png", "-i", "prompt_strength=0",
        "-i", "num_outputs=2", "-i", "output_format=png", "-i", "disable_safety_checker=true", "-o", "cat.png",
        environment=environment, folder=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["cat.0.png", "cat.1.png"]
    for name in done.stdout.split():
        expected = photo.resize((240, 304), Image.Resampling.LANCZOS)
        assert np.array_equal(np.asarray(Image.open(tmp_path / name)), np.asarray(expected))


def test_predict_takes_and_gives_json(environment: dict[str, str], tmp_path: Path) -> None:
    inputs = {"prompt": "a cat", "megapixels": "0.25", "num_inference_steps": 1, "seed": 3}
    done = script("predict", "--json", "-", environment=environment, folder=tmp_path, stdin=json.dumps(inputs))
    assert done.returncode == 0, done.stderr
    prediction = json.loads(done.stdout)
    assert prediction["metrics"]["seed"] == 3
    assert prediction["output"] == ["output.0.webp"]
    with Image.open(tmp_path / "output.0.webp") as picture:
        assert picture.size == (512, 512)
    assert "denoising: 100%" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["-i", "prompt"], "usage error: 'prompt' is not of the form name=value.\n"),
        (["-i", "promt=x"], "usage error: there is no input promt; there are prompt, image, mask,"),
        (["-i", "image=@nowhere.png"], "usage error: nowhere.png cannot be read: No such file or directory.\n"),
        (["-i", "prompt=x", "-i", "image=here.png"], "put @ before its name to send it, -i image=@here.png.\n"),
        (["--json", '{"extra_lora": "here.png"}'], "usage error: here.png is a file on this machine: put @ before"),
        (["-i", "image=@large.png"], "usage error: the request has 107 MiB and the server takes 100: send smaller"),
        (["--json", "[1]"], "usage error: --json needs one JSON object with the inputs.\n"),
        (["-i", "prompt=x", "-i", "seed=x"], 'seed: "x" is not of type "integer"\n'),
        (["-i", "prompt=x", "-i", "image=/nowhere/x.png"], "image must be an http(s) address or a data: URI;"),
        (["-i", "prompt=x", "-e", "FLUX_DEVICE=tpu"], "server error: SettingsError: The environment variable FLUX_DEV"),
    ],
)
def test_predict_fails_with_one_sentence(
    environment: dict[str, str], tmp_path: Path, arguments: list[str], sentence: str
) -> None:
    (tmp_path / "here.png").touch()
    with (tmp_path / "large.png").open("wb") as large:
        large.truncate(80 << 20)
    done = script("predict", *LIGHT, *arguments, environment=environment, folder=tmp_path)
    assert done.returncode == 1
    assert sentence in done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr


def test_predict_takes_a_lora_that_is_too_large_to_be_sent(environment: dict[str, str], tmp_path: Path) -> None:
    """By its name, from a folder that the server may read; two of them come from two folders."""
    names = ("replicate_weights=@a/big.safetensors", "extra_lora=@b/big.safetensors")
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        with (tmp_path / folder / "big.safetensors").open("wb") as big:
            big.truncate(120 << 20)
    request = ["-i", "prompt=x", "-i", "num_inference_steps=1", *[part for name in names for part in ("-i", name)]]
    done = script(
        "predict", *LIGHT, *request, environment={**environment, "LORA_CACHE_DIR": str(tmp_path / "c")}, folder=tmp_path
    )
    assert done.returncode == 1
    assert re.search(
        r"^replicate_weights-big\.safetensors is not a whole safetensors file \(", done.stderr, re.MULTILINE
    )


@pytest.mark.parametrize(
    "name",
    [
        "bench",
        "demo",
        "fleet",
        "gallery",
        "lint",
        "lora",
        "play",
        "predict",
        "schema",
        "serve",
        "test",
        "test-fleet",
        "test-image",
        "test-play",
        "weights",
    ],
)
def test_every_script_has_help(name: str, tmp_path: Path) -> None:
    for option in ("-h", "--help"):
        done = script(name, option, environment=dict(os.environ), folder=tmp_path)
        assert done.returncode == 0
        assert len(done.stdout) > 40


def test_a_missed_goal_of_a_benchmark_is_named_and_is_the_exit_status_on_request(
    capsys: pytest.CaptureFixture[str],
) -> None:
    met = [Goal("ratio", 1.5, 1.5), Goal("share", 0.9, 0.9, at_least=True)]
    missed = [Goal("ratio", 1.76, 1.5), Goal("share", float("nan"), 0.9, at_least=True)]
    judge(met, check=True)
    judge(met + missed, check=False)
    with pytest.raises(SystemExit) as stopped:
        judge(missed, check=True)
    assert stopped.value.code == 1
    named = "missed: ratio: 1.76, goal: at most 1.5\nmissed: share: nan, goal: at least 0.9\n"
    assert capsys.readouterr().out == 2 * named


@contextmanager
def serving(
    *options: str, environment: dict[str, str], folder: Path
) -> "Iterator[tuple[str, subprocess.Popen[str], str]]":
    """script/serve on a free port, when it serves: its address, its process, what it has logged."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(ROOT / "script" / "serve"), "--port", str(port), *options]
    with subprocess.Popen(
        command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as serve:
        url = f"http://127.0.0.1:{port}"
        assert serve.stderr is not None
        log = ""
        for line in serve.stderr:
            log += line
            if line == f"Serving at {url}/predictions; Ctrl-C stops.\n":
                break
        yield url, serve, log


def test_serve_serves_until_ctrl_c(environment: dict[str, str], tmp_path: Path) -> None:
    with serving(environment=environment, folder=tmp_path) as (url, serve, log):
        assert _status(url) == "READY"
        assert requests.post(f"{url}/predictions", json={"input": {}}, timeout=None).status_code == 422
        assert "Input" in requests.get(f"{url}/openapi.json", timeout=None).json()["components"]["schemas"]
        os.killpg(serve.pid, signal.SIGINT)  # a terminal's Ctrl-C goes to the whole group
        rest = serve.communicate()[1]
    assert serve.returncode == 0
    assert "Traceback" not in log + rest
    assert _status(url) is None


def test_serve_puts_pictures_into_a_store_and_stops_its_server_at_sigterm(
    environment: dict[str, str], tmp_path: Path, small: dict[str, Any]
) -> None:
    with (
        receiver("http://store.example/{}") as (store, received),
        serving("--upload-url", store, environment=environment, folder=tmp_path) as (url, serve, log),
    ):
        answer = predict(url, {**small, "num_outputs": 2})
        os.kill(serve.pid, signal.SIGTERM)  # to script/serve alone
        rest = serve.communicate()[1]
    assert serve.returncode == 0
    assert "Traceback" not in log + rest
    assert _status(url) is None
    assert {(one.method, one.path) for one in received} == {("PUT", "/out-0.png"), ("PUT", "/out-1.png")}
    assert {one.headers["content-type"] for one in received} == {"image/png"}
    assert all(Image.open(io.BytesIO(one.body)).size == (256, 320) for one in received)
    kept = f"http://store.example/{answer['id']}"
    assert sorted(answer["output"]) == [f"{kept}/out-0.png", f"{kept}/out-1.png"]


def _status(url: str) -> str | None:
    try:
        status: str = requests.get(f"{url}/health-check", timeout=None).json()["status"]
    except requests.ConnectionError:
        return None
    return status


def test_a_server_that_is_gone_is_one_sentence() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        with pytest.raises(ServerError, match=r"^Cog's server ended before it answered\.$"):
            predict(f"http://127.0.0.1:{nobody.getsockname()[1]}", {"prompt": "x"})
