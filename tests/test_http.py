"""What docs/http.md says of Cog's HTTP interface, through the real server."""

import io
import json
import re
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
from PIL import Image

from tests.conftest import Server
from tests.test_docs import DOCS, tokens
from tools.receiver import receiver
from tools.server import wait_until_idle

ASYNC = {"Prefer": "respond-async"}


def test_the_examples_of_the_page_run(server: Server, tmp_path: Path) -> None:
    """All of them in turn, with the test's own server and a free port in place of those that they name."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    seen: dict[str, Any] = {}
    for block in (token for token in tokens(DOCS / "http.md") if token.type == "fence"):
        code = block.content.replace("http://127.0.0.1:5000", server.url).replace("8000", str(port))
        if block.info == "sh":
            subprocess.run(["bash", "-euo", "pipefail", "-c", code], cwd=tmp_path, check=True)
        else:
            exec(compile(code, "docs/http.md", "exec"), seen)
    assert json.loads((tmp_path / "answer.json").read_text())["status"] == "succeeded"
    assert Image.open(io.BytesIO(seen["pictures"][0])).size == (512, 512)
    assert seen["same_pictures"] == seen["pictures"]
    assert [prediction["status"] for prediction in seen["received"]] == ["processing", "succeeded"]
    assert [seen[name].status_code for name in ("first", "again", "canceled")] == [202, 202, 200]


def test_webhooks_tell_the_progress_and_bring_the_whole_answer(server: Server, small: dict[str, Any]) -> None:
    """The last of a webhook's events can overtake each other."""
    request = {**small, "num_outputs": 2}
    expected = server(**request)
    wait_until_idle(server.url)
    with receiver() as (url, received):
        body = {"id": "mine", "input": request, "webhook": url}
        answer = requests.post(f"{server.url}/predictions", json=body, headers=ASYNC, timeout=None)
        assert (answer.status_code, answer.json()) == (202, {"id": "mine", "status": "starting"})
        while sum(b'"output"' in one.body for one in received) < 3:  # one for each picture, and the whole answer
            time.sleep(0.01)
    predictions = [json.loads(one.body) for one in received]
    assert {prediction["id"] for prediction in predictions} == {"mine"}
    assert {"id": "mine", "logs": "", "metrics": {}, "status": "processing"} in predictions
    completed = next(prediction for prediction in predictions if prediction["status"] == "succeeded")
    assert completed["output"] == expected["output"]
    assert completed["metrics"].keys() == expected["metrics"].keys()
    assert "denoising: 100%" in completed["logs"]
    outputs = [prediction["output"] for prediction in predictions if "output" in prediction]
    assert sorted(map(len, outputs)) == [1, 2, 2]
    logs = [prediction["logs"] for prediction in predictions]
    assert all(completed["logs"].startswith(log.rsplit("\r", 1)[0]) for log in logs)


def test_a_put_of_an_id_that_runs_starts_nothing(server: Server, small: dict[str, Any]) -> None:
    url = f"{server.url}/predictions/twice"
    slow = {**small, "num_inference_steps": 50, "seed": 4711}
    wait_until_idle(server.url)
    server.log.clear()
    with ThreadPoolExecutor() as pool:
        first = pool.submit(requests.put, url, json={"input": slow}, timeout=None)
        while "seed 4711" not in "\n".join(server.log):
            time.sleep(0.01)
        again = requests.put(url, json={"input": {**slow, "seed": 4712}}, timeout=None)
        assert again.status_code == 202
        assert again.json()["status"] == "processing"
        assert again.json()["input"] == slow
        assert first.result().json()["status"] == "succeeded"
    wait_until_idle(server.url)
    assert len(re.findall(r"seed 471\d$", "\n".join(server.log), re.MULTILINE)) == 1


@pytest.mark.parametrize(
    ("method", "path", "options", "status", "words"),
    [
        ("GET", "/predictions/any", {}, 405, ""),
        ("POST", "/predictions/any/cancel", {}, 404, "{}"),
        ("PUT", "/predictions/a", {"json": {"id": "b", "input": {}}}, 422, "must match the ID supplied in the URL"),
        ("POST", "/predictions", {"data": '{"input": {"prompt": "x"}}'}, 422, "Field required"),
        ("POST", "/predictions", {"json": {"input": {"prompt": "x", "seed": None}}}, 422, '"input","seed"'),
        ("POST", "/predictions", {"json": {"webhook_events_filter": ["end"]}}, 422, "unknown variant `end`"),
        ("POST", "/predictions", {"json": {}, "headers": {"Accept": "text/event-stream"}}, 406, "streaming"),
    ],
)
def test_what_is_no_request_is_refused(
    server: Server, method: str, path: str, options: dict[str, Any], status: int, words: str
) -> None:
    answer = requests.request(method, server.url + path, **options, timeout=None)
    assert answer.status_code == status
    assert words in answer.text


def test_what_is_not_known_is_ignored(server: Server, small: dict[str, Any]) -> None:
    """An input, a name beside the inputs, and a preference that there once was."""
    quick = {**small, "num_inference_steps": 1}
    body = {"input": {**quick, "promtp": "x"}, "output_file_prefix": "http://127.0.0.1:9/"}
    wait_until_idle(server.url)
    answer = requests.post(f"{server.url}/predictions", json=body, headers={"Prefer": "wait=1"}, timeout=None)
    assert answer.json()["output"] == server(**quick)["output"]
