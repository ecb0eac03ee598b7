"""A server that cannot be saved ends, so that whoever watches it starts a new one."""

import os
import signal
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import requests

from service.watchdog import BEGUN, ENDED, Guard
from tools.server import CogServer, cog_server

SECONDS = 60.0  # more than a loaded machine needs


def test_a_request_has_its_time_and_no_more() -> None:
    guard = Guard(100, 10)
    guard.hear(BEGUN, now=0)
    assert guard.complaint(now=99) is None
    assert "REQUEST_TIMEOUT, 100 s" in (guard.complaint(now=101) or "")
    guard.hear(ENDED, now=102)
    assert guard.complaint(now=1000) is None  # a server that was never seen ready is not judged by that
    guard.see("READY", now=1000)
    guard.see("BUSY", now=1009)
    guard.see(None, now=1010)
    assert guard.complaint(now=1010) is None
    assert "INPUT_TIMEOUT, 10 s" in (guard.complaint(now=1011) or "")
    guard.hear(BEGUN + ENDED + BEGUN, now=1012)  # another request after all
    assert guard.complaint(now=1111) is None
    guard.see("READY", now=1112)  # its end was cancelled
    assert guard.complaint(now=1121) is None


def test_no_limit_is_no_limit() -> None:
    guard = Guard(0, 0)
    guard.see("READY", now=0)
    assert guard.complaint(now=1e9) is None
    guard.hear(BEGUN, now=0)
    assert guard.complaint(now=1e9) is None


def children(process: int) -> list[int]:
    """Each thread has its own."""
    return [
        int(child) for file in Path(f"/proc/{process}/task").glob("*/children") for child in file.read_text().split()
    ]


def wait_for_the_end(cog: CogServer) -> int:
    """The server's exit code."""
    return cog.process.wait(SECONDS)


pytestmark = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="reads /proc")


def test_a_server_whose_worker_is_dead_ends_with_an_error(light: dict[str, str]) -> None:
    log: list[str] = []
    with cog_server(light, on_log=log.append) as cog:
        (worker,) = children(cog.process.pid)
        os.kill(worker, signal.SIGKILL)
        assert wait_for_the_end(cog) != 0
    assert "watchdog: the worker is dead: the server is ended" in log


def test_a_request_that_takes_too_long_ends_the_server(light: dict[str, str]) -> None:
    """Its LoRA drips for ever. Other requests before it have their time, and an idle server has no limit."""
    ended = threading.Event()

    def drip(server: socket.socket) -> None:
        connected, _ = server.accept()
        with connected, suppress(OSError):
            connected.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n")
            while not ended.wait(0.1):
                connected.sendall(b"x")

    with (
        socket.create_server(("127.0.0.1", 0)) as hostile,
        cog_server(light | {"INPUT_TIMEOUT": "3", "REQUEST_TIMEOUT": "6", "LORA_ALLOW_PRIVATE_HOSTS": "1"}) as cog,
    ):
        threading.Thread(target=drip, args=(hostile,), daemon=True).start()
        assert cog.predict({"prompt": "x"})["status"] == "succeeded"
        time.sleep(4)  # an idle server is left alone
        assert cog.predict({"prompt": "4"})["status"] == "succeeded"
        url = f"http://127.0.0.1:{hostile.getsockname()[1]}/x.safetensors"
        with suppress(requests.ConnectionError):
            body = {"input": {"prompt": "x", "extra_lora": url}}
            answer = requests.post(f"{cog.url}/predictions", json=body, timeout=SECONDS)
            assert answer.json()["status"] == "failed"
        assert wait_for_the_end(cog) != 0
        ended.set()


def test_a_server_that_is_asked_to_end_does_so_without_an_error(light: dict[str, str]) -> None:
    """The fixture `server` asks the same of one that has served all that the tests asked for."""
    with cog_server(light) as cog:
        cog.process.terminate()
        assert wait_for_the_end(cog) == 0


def test_the_predictor_itself_is_guarded(environment: dict[str, str], tmp_path: Path) -> None:
    """The other tests of the guards have a predictor without models."""
    guards = {"INPUTS_AS_DATA_ONLY": "1", "REQUEST_TIMEOUT": "1", "TMPDIR": str(tmp_path)}
    slow = {"prompt": "x", "aspect_ratio": "custom", "width": 1440, "height": 1440, "num_inference_steps": 50}
    log: list[str] = []
    with cog_server(environment | guards, on_log=log.append) as cog:
        assert (
            "takes pictures only as data: URIs"
            in cog.predict({"prompt": "x", "image": "http://169.254.169.254/x"})["error"]
        )
        with suppress(requests.ConnectionError):
            answer = requests.post(f"{cog.url}/predictions", json={"input": slow}, timeout=SECONDS)
            assert answer.json()["status"] == "failed"
        assert wait_for_the_end(cog) != 0
    assert "watchdog: a request has run for more than REQUEST_TIMEOUT, 1 s: the worker is ended" in log
    assert "watchdog: the worker is dead: the server is ended" in log
