"""One prediction by a Cog server over HTTP: sent, waited for, followed, cancelled, and its answer understood."""

import json
import re
import time
import uuid
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from threading import Event
from typing import Any

import httpx

from play.fields import PROMPT
from play.files import File
from play.progress import Bar, Hooks, last_bar

Json = dict[str, Any]
Request = Json  # the inputs of one prediction; a file among them is a `File`

POLL_SECONDS = 0.15
BUSY_PAUSE_SECONDS = 0.5
CONNECT_SECONDS = 10
# Cog says "Prediction failed: " twice and names the exception's class before the sentence itself
COGS_WORDS = re.compile(r"^(Prediction failed: )*(\w+(Error|Exception): )?")


class ServerError(RuntimeError):
    """The server cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class Problem:
    """What is wrong, in the server's words, and the name of the input that it is about, if any."""

    sentence: str
    name: str | None = None


@dataclass(frozen=True)
class Running:
    """How far a prediction is. `bar` is None until steps are known; `waiting` while the server serves others."""

    seconds: float
    bar: Bar | None = None
    log: str = ""
    waiting: bool = False


@dataclass(frozen=True)
class Answer:
    """How a prediction ended: with `outputs` (URIs), with `problems`, or cancelled."""

    outputs: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = ()
    cancelled: bool = False
    metrics: Json = field(default_factory=dict)
    log: str = ""


@dataclass(frozen=True)
class Server:
    """A Cog server at `url`. It reports its progress to `hooks`, where it can reach them."""

    url: str
    hooks: Hooks

    def document(self) -> Json:
        """What /openapi.json answers. Raises `ServerError`."""
        try:
            response = httpx.get(f"{self.url}/openapi.json", timeout=CONNECT_SECONDS)
            document: Json = response.raise_for_status().json()
        except (httpx.HTTPError, httpx.InvalidURL, json.JSONDecodeError) as error:
            raise ServerError(f"{self.url} does not answer as a Cog server that is ready ({error}).") from None
        return document

    def predict(self, request: Request, stop: Event) -> Generator[Running, None, Answer]:
        """Yields several times a second until the prediction has ended; returns how.

        `stop` cancels it, and so does closing the generator. While the server is busy the request is sent again.
        """
        started = time.monotonic()
        body = {name: value.data_url() if isinstance(value, File) else value for name, value in request.items()}
        while not stop.is_set():
            try:
                response, log = yield from self._send(body, stop, started)
            except httpx.HTTPError as error:
                sentence = f"{self.url} cannot be reached ({error or type(error).__name__})."
                return Answer(problems=(Problem(sentence),))
            if not _busy(response):
                return understand(response, request, log)
            yield Running(time.monotonic() - started, waiting=True)
            stop.wait(BUSY_PAUSE_SECONDS)
        return Answer(cancelled=True)

    def _send(self, body: Json, stop: Event, started: float) -> Generator[Running, None, tuple[httpx.Response, str]]:
        """Send the request once; returns the response, and the log as far as it was told. Raises `httpx.HTTPError`."""
        identity = uuid.uuid4().hex
        with self.hooks.listen(identity) as hook, ThreadPoolExecutor(1) as pool:
            message = {"input": body, "webhook": hook.url, "webhook_events_filter": ["start", "logs"]}
            limits = httpx.Timeout(None, connect=CONNECT_SECONDS)
            sending = pool.submit(httpx.put, f"{self.url}/predictions/{identity}", json=message, timeout=limits)
            try:
                while not _done(sending):
                    if stop.is_set():
                        self._cancel(identity)
                    yield Running(time.monotonic() - started, last_bar(hook.log), hook.log)
            finally:
                while not _done(sending):  # whoever asked has gone: the server need not go on
                    self._cancel(identity)
            return sending.result(), hook.log

    def _cancel(self, identity: str) -> None:
        """The server answers 404 until it has the request, so this is done until the prediction has ended."""
        try:
            httpx.post(f"{self.url}/predictions/{identity}/cancel", timeout=CONNECT_SECONDS)
        except httpx.HTTPError:
            return


def _done(sending: "Future[httpx.Response]") -> bool:
    """Whether there is an answer, after a pause in which one may come."""
    wait([sending], POLL_SECONDS)
    return sending.done()


def _busy(response: httpx.Response) -> bool:
    """409 is Cog's answer while it serves others; a queue before it may say 503 and when to come again."""
    return response.status_code == 409 or (response.status_code == 503 and "retry-after" in response.headers)


def understand(response: httpx.Response, request: Request, log: str = "") -> Answer:
    """How the prediction of `request` ended. Cog leaves out the log of one that failed: webhooks brought `log`."""
    try:
        answer: Json = response.json()
    except json.JSONDecodeError:
        return Answer(problems=(Problem(f"The server answers {response.status_code} and no JSON."),), log=log)
    metrics, log = answer.get("metrics") or {}, answer.get("logs") or log
    if "detail" in answer:
        problems = tuple(Problem(str(one["msg"]), str(one["loc"][-1])) for one in answer["detail"])
        return Answer(problems=problems, log=log)
    if answer.get("status") == "canceled":
        return Answer(cancelled=True, metrics=metrics, log=log)
    if answer.get("status") != "succeeded":
        sentence = COGS_WORDS.sub("", str(answer.get("error") or answer))
        return Answer(problems=(Problem(sentence, named_input(sentence, request)),), metrics=metrics, log=log)
    output = answer.get("output") or ()
    return Answer(outputs=(output,) if isinstance(output, str) else tuple(output), metrics=metrics, log=log)


def named_input(sentence: str, request: Request) -> str | None:
    """The input of the request that the sentence is about: its first word, or the one whose value it quotes."""
    for name, value in request.items():
        if re.match(rf"{name}\b", sentence):
            return name
        if isinstance(value, str) and len(value) > 2 and name != PROMPT and value.split("://")[-1] in sentence:
            return name
    loras = [name for name, value in request.items() if isinstance(value, File) and not value.is_picture]
    return loras[0] if len(loras) == 1 and "data: URI" in sentence else None
