"""Start a fleet on this machine, with a Ray of its own and on free ports, and stop it: for tests and benchmarks."""

import os
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import requests

from tools import ROOT
from tools.server import ServerError, free_port

PYTHON = ROOT / ".venv-fleet" / "bin" / "python"
POLL_SECONDS = 0.05
SECONDS = 120  # for an answer
STOP_SECONDS = 60


@dataclass
class Fleet:
    """One that runs."""

    url: str
    metrics_port: int
    process: "subprocess.Popen[str]"
    log: list[str] = field(default_factory=list)

    def __call__(self, **inputs: Any) -> dict[str, Any]:
        """Make a prediction. Raises `ServerError` for an answer that is none."""
        response = self.post({"input": inputs})
        if response.status_code != 200:
            raise ServerError(f"the fleet answers {response.status_code}: {response.text[:200]}")
        answer: dict[str, Any] = response.json()
        return answer

    def post(self, body: Any, prefer: str | None = None) -> requests.Response:
        """Send it to /predictions."""
        headers = {"Prefer": prefer} if prefer else None
        return requests.post(f"{self.url}/predictions", json=body, headers=headers, timeout=SECONDS)

    def put(self, id_: str, **inputs: Any) -> requests.Response:
        """Make a prediction of this id."""
        return requests.put(f"{self.url}/predictions/{id_}", json={"input": inputs}, timeout=SECONDS)

    def cancel(self, id_: str) -> int:
        """The answer's status."""
        return requests.post(f"{self.url}/predictions/{id_}/cancel", timeout=SECONDS).status_code

    def health(self) -> dict[str, Any]:
        """What /health-check says."""
        answer: dict[str, Any] = requests.get(f"{self.url}/health-check", timeout=30).json()
        return answer

    def metrics(self) -> Counter[str]:
        """The sum over workers of each of the fleet's metrics."""
        text = requests.get(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=30).text
        sums: Counter[str] = Counter()
        for name, value in re.findall(r"^ray_(fleet_\w+)\{.*\} (\S+)$", text, re.MULTILINE):
            sums[name] += float(value)  # type: ignore[assignment]
        return sums


@contextmanager
def started_fleet(
    *options: str, module: str = "fleet", environment: Mapping[str, str] | None = None
) -> Iterator[Fleet]:
    """`script/fleet` with these options, ready or not; `environment` is added to this process's own."""
    port, metrics_port = free_port(), free_port()
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    process = subprocess.Popen(
        [PYTHON, "-m", module, "--port", str(port), "--metrics-port", str(metrics_port), *options],
        cwd=ROOT,
        env=os.environ | {"RAY_TMPDIR": folder} | dict(environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    fleet = Fleet(f"http://127.0.0.1:{port}", metrics_port, process)
    reader = threading.Thread(target=lambda: fleet.log.extend(process.stdout or ()), daemon=True)
    reader.start()
    try:
        yield fleet
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(STOP_SECONDS)
        reader.join(STOP_SECONDS)
        if process.stdout:
            process.stdout.close()
        shutil.rmtree(folder, ignore_errors=True)


def wait_until_ready(fleet: Fleet) -> None:
    """Raises `ServerError` when it ends instead."""
    while not any("Serving at" in line for line in fleet.log):
        if fleet.process.poll() is not None:
            raise ServerError("".join(fleet.log[-20:]))
        time.sleep(POLL_SECONDS)
    fleet.health()  # so that the front has met its workers
