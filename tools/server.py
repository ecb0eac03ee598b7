"""Start Cog's real server on this machine without Docker, wait until it is ready, pass its log on, and stop it."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import requests

from tools import ROOT
from tools.cog_schema import write_schema

POLL_SECONDS = 0.05
CONFLICT = 409  # while another prediction runs


class ServerError(RuntimeError):
    """The server did not start or gave no answer; the message says why, the predictor's own where there is one."""


@dataclass(frozen=True)
class CogServer:
    """A server that is ready for predictions."""

    url: str
    process: "subprocess.Popen[str]"

    def predict(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Make a prediction: `predict` on this server."""
        return predict(self.url, inputs)


def predict(url: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Make a prediction on the server at `url`, however long it takes. Returns coglet's whole answer. Raises
    `ServerError` when that is no JSON, and when the server ends before it answers."""
    while True:
        try:
            wait_until_idle(url)
            response = requests.post(f"{url}/predictions", json={"input": dict(inputs)}, timeout=None)
        except requests.ConnectionError:
            raise ServerError("Cog's server ended before it answered.") from None
        if response.status_code != CONFLICT:  # coglet is busy until a few milliseconds after an answer
            break
        time.sleep(POLL_SECONDS)
    try:
        answer: dict[str, Any] = response.json()
    except ValueError:
        raise ServerError(f"Cog's server answers {response.status_code}: {response.text[:200]}") from None
    return answer


class Project(NamedTuple):
    """What is served."""

    folder: Path = ROOT  # with predict.py
    python: Path = Path(sys.executable)  # has what that needs
    checked: bool = True  # whether requests are checked against the schema of predict.py


OURS = Project()


@contextmanager
def cog_server(
    environment: Mapping[str, str] | None = None,
    on_log: Callable[[str], None] = lambda line: None,
    address: tuple[str, int | None] = ("127.0.0.1", None),
    upload_url: str | None = None,
    project: Project = OURS,
) -> Iterator[CogServer]:
    """Serve `predict.py:Predictor`; the body runs when the server is ready.

    `environment` is added to this process's own. `on_log` is called, on another thread, with every line that the
    predictor logs, and with coglet's own warnings. `address` is the host to listen on and the port, None for a free
    one. With an `upload_url` coglet puts the pictures there. The server ends with the thread that calls this, however
    that ends. Raises `ServerError` when `setup()` fails.
    """
    if project.checked:
        write_schema(project.folder)
    host, port = address[0], address[1] or free_port()
    upload = ["--upload-url", upload_url] if upload_url else []
    process = subprocess.Popen(
        [*_ended_with_us(), str(project.python), "-m", "cog.server.http", "--host", host, *upload],
        cwd=project.folder,
        env={**os.environ, **_server_environment(port, project.python), **(environment or {})},
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,  # so that Ctrl-C does not reach the worker, which would then take ten seconds to end
    )
    listener = threading.Thread(target=_listen, args=(process, on_log), daemon=True)
    listener.start()
    try:
        url = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"
        _wait_until_ready(url, process)
        yield CogServer(url, process)
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        listener.join(5)
        if process.stderr:
            process.stderr.close()


def end_on_sigterm(status: int) -> None:
    """Have SIGTERM end this process as an exception does, with that exit status: the server that it started is stopped
    on the way."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(status))


def _ended_with_us() -> list[str]:
    """A command that has the kernel end what it runs when we end, however we do; Linux alone has it."""
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "KILL", "--"] if setpriv else []


def _server_environment(port: int, python: Path) -> dict[str, str]:
    """The variables that coglet reads. It starts its worker as the first `python` in PATH, which has to be this one."""
    return {
        "COG_PREDICT_TYPE_STUB": "predict.py:Predictor",
        "PORT": str(port),
        "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",
        "TRANSFORMERS_VERBOSITY": os.environ.get("TRANSFORMERS_VERBOSITY", "error"),
    }


def free_port() -> int:
    """One that nobody listens on now, on this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_until_ready(url: str, process: "subprocess.Popen[str]") -> None:
    while True:
        if process.poll() is not None:
            raise ServerError(f"Cog's server stopped with exit code {process.returncode}.")
        try:
            health = requests.get(f"{url}/health-check", timeout=5).json()
        except (requests.ConnectionError, requests.Timeout):
            health = {"status": "STARTING"}
        if health["status"] == "READY":
            return
        if health["status"] in ("SETUP_FAILED", "DEFUNCT"):
            # coglet puts its own words before the predictor's: "...: setup failed: SettingsError: The ..."
            raise ServerError(health["setup"]["logs"].rsplit("setup failed: ", 1)[-1].strip())
        if health["status"] == "UNHEALTHY":
            raise ServerError(health["user_healthcheck_error"])
        time.sleep(POLL_SECONDS)


def wait_until_idle(url: str) -> None:
    """Wait until coglet takes a request: it runs one at a time, and is busy until a moment after it has answered."""
    while True:
        with suppress(requests.ReadTimeout):  # the worker is too busy to say that it is
            if requests.get(f"{url}/health-check", timeout=30).json()["status"] != "BUSY":
                return
        time.sleep(POLL_SECONDS)


def _listen(process: "subprocess.Popen[str]", on_log: Callable[[str], None]) -> None:
    """Pass on the predictor's lines. coglet logs JSON; the predictor's are those with a source or with its target."""
    for line in process.stderr or ():
        try:
            record = json.loads(line)
            own = record["target"] in ("coglet::user", "coglet::setup") or "source" in record["fields"]
            text = str(record["fields"]["message"])
            if own or record["level"] in ("WARN", "ERROR"):
                on_log(text)
        except (ValueError, KeyError):
            on_log(line.rstrip("\n"))
