"""One GPU and one Cog server on it. Ray keeps as many of these as there are workers, and replaces those that end."""

import asyncio
import json
import os
import re
import signal
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import aiohttp
from ray import serve

from fleet.metrics import WorkerMetrics
from tools import ROOT
from tools.server import Project, cog_server

CONFLICT = 409  # coglet is busy until some milliseconds after its last answer
RETRY_SECONDS = 0.002
MOST_CONFLICT_SECONDS = 60.0  # a server that is busy without a prediction for so long stands still
ASK_SECONDS = 10.0  # more than coglet gives the predictor to say how it is
GOOD = ("READY", "BUSY")
SERVER_PYTHON = ROOT / ".venv/bin/python"  # has what the predictor needs; in a container this process's own has it


class Answer(NamedTuple):
    """An HTTP answer, as the server gave it."""

    status: int
    content_type: str
    body: bytes
    retry_after: int = 0  # seconds, for the header of that name; 0 for none


class Worker:
    """A deployment: bound by `fleet.app`, called by the front.

    Whatever breaks the server ends this process: its prediction is tried elsewhere and Ray starts another worker, which
    is one way for all faults.
    """

    _session: aiohttp.ClientSession | None

    def __init__(self, project: str, longest_seconds: float, generation: int) -> None:
        """Start the server of the predict.py in the folder `project`, and wait until it is ready.

        A prediction that takes longer than `longest_seconds` has lost its server. `generation` changes nothing: another
        one makes Ray replace the workers one after another. Raises `ServerError` with what `setup()` said.
        """
        del generation
        name = serve.get_replica_context().replica_id.unique_id
        self._longest_seconds, self._metrics = longest_seconds, WorkerMetrics(name)
        self._started, self._session = ExitStack(), None
        python = SERVER_PYTHON if SERVER_PYTHON.exists() else Path(sys.executable)
        served = Project(Path(project), python, checked=project == str(ROOT))
        server = cog_server(on_log=_print, project=served)
        self._server = self._started.enter_context(server)

    async def predict(
        self, ticket: str, method: str, path: str, content_type: str, body: bytes, additions: dict[str, Any]
    ) -> Answer:
        """The server's answer to a prediction.

        `ticket` is for the router alone. `additions` go into the JSON body: `id`, and `seed` into its input.
        """
        del ticket
        if additions:
            body = _with_additions(body, additions)
        answer = await self._send(method, path, content_type, body)
        if b'"status":"failed"' in answer.body and (state := await self._state()) not in GOOD:
            self._end(f"is {state}")  # so that the front tries again what was the server's fault
        if match := re.search(rb'"lora_cache":"(\w+)"', answer.body[: answer.body.find(b'"output"')]):
            self._metrics.lora_cache(match[1].decode())
        return answer

    async def ask(self, *, method: str, path: str, worker: str = "") -> Answer:
        """The server's answer to anything that takes no time; `worker` is for the router alone.

        Raises `TimeoutError` when there is none in time.
        """
        del worker
        return await self._request(method, path, "", b"", ASK_SECONDS)

    async def check_health(self) -> None:
        """Ray calls this every few seconds, and ends a worker for which this has raised three times in a row."""
        state = await self._state()
        if state not in GOOD:
            raise RuntimeError(f"Cog's server is {state}.")

    async def _state(self) -> str:
        """What /health-check says."""
        answer = await self.ask(method="GET", path="/health-check")
        return str(json.loads(answer.body)["status"])

    async def __del__(self) -> None:
        """Ray calls this when a worker is to end and its predictions are done."""
        if self._session is not None:
            await self._session.close()
        await asyncio.to_thread(self._started.close)

    async def _send(self, method: str, path: str, content_type: str, body: bytes) -> Answer:
        give_up = time.monotonic() + MOST_CONFLICT_SECONDS
        while True:
            try:
                answer = await self._request(method, path, content_type, body, self._longest_seconds)
            except TimeoutError:
                self._end("stands still")
            if answer.status != CONFLICT:
                return answer
            if time.monotonic() > give_up:
                self._end("is busy with nothing")
            await asyncio.sleep(RETRY_SECONDS)

    async def _request(self, method: str, path: str, content_type: str, body: bytes, seconds: float) -> Answer:
        if self._session is None:  # made here, where the event loop runs
            self._session = aiohttp.ClientSession(self._server.url)
        try:
            async with self._session.request(
                method,
                path,
                data=body or None,
                headers={"Content-Type": content_type} if content_type else {},
                skip_auto_headers=["Content-Type"],
                timeout=aiohttp.ClientTimeout(total=seconds),
            ) as response:
                return Answer(response.status, response.content_type, await response.read())
        except aiohttp.ClientError as error:
            self._end(f"has gone ({type(error).__name__})")

    def _end(self, why: str) -> NoReturn:
        _print(f"Cog's server {why}: this worker ends, and another one is started.")
        with suppress(ProcessLookupError):
            os.killpg(self._server.process.pid, signal.SIGKILL)  # what stands still would keep the GPU's memory
        os._exit(1)


def _with_additions(body: bytes, additions: dict[str, Any]) -> bytes:
    document = json.loads(body)
    if "seed" in additions:
        document.setdefault("input", {})["seed"] = additions["seed"]
    if "id" in additions:
        document["id"] = additions["id"]
    return json.dumps(document).encode()


def _print(line: str) -> None:
    """To this process's own stderr: Serve has put a log that drops it in the place of `print` and `sys.stderr`."""
    os.write(2, f"{line}\n".encode())
