"""Cog's HTTP interface for the whole fleet: a queue instead of a 409, and a second try where a worker is lost."""

import asyncio
import json
import math
import time
from collections.abc import Coroutine
from contextvars import Context
from typing import Any, TypeVar

from jsonschema import Draft7Validator
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException, RequestCancelledError
from ray.serve.handle import DeploymentHandle, DeploymentResponse
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route

from fleet.bodies import VALID_ID, Body, canceled, failed, new_id, read_body, to_json
from fleet.metrics import FrontMetrics
from fleet.state import fleet_state
from fleet.tickets import TICKETS, WORKERS, Ticket
from fleet.webhooks import send_webhook
from fleet.worker import Answer

TRIES = 2
JSON = "application/json"
MOST_BYTES = 100 * 2**20  # of a request, as coglet has it
ASYNCHRONOUS = "respond-async"
ASK_SECONDS = 30.0
STATE_SECONDS = 1.0  # for which what Ray said of the fleet is taken as true
CANCEL_SECONDS, CANCEL_PAUSE = 5.0, 0.02  # in which a prediction that has got its worker arrives there
LONGEST_RETRY_AFTER = 600
LATE = "No worker was free in time: try again later."
LOST = "The worker that ran this prediction was lost, and so was the one that tried it again."


T = TypeVar("T")


class Front:
    """A deployment of one replica: it holds the queue."""

    def __init__(
        self, workers: DeploymentHandle, inputs: dict[str, Any], longest_queue: int, longest_wait: float
    ) -> None:
        """Beyond `longest_queue` waiting predictions, or `longest_wait` seconds in the queue, the answer is 503.

        `inputs` is the JSON schema of what a prediction takes. What it does not allow is not taken in the background:
        the client waits for a server to say what is wrong.
        """
        self._inputs = Draft7Validator(inputs)
        self._workers, self._longest_queue, self._longest_wait = workers, longest_queue, longest_wait
        self._metrics = FrontMetrics()
        self._mean_seconds = 0.0  # of a prediction, lately
        self._kept: dict[str, Answer] = {}  # what every worker answers alike, by path
        self._state: dict[str, Any] = {"status": "STARTING"}
        self._state_until = 0.0
        self._tasks: set[asyncio.Task[Any]] = set()
        self._routes = (
            Route("/predictions", self.create, methods=["POST"]),
            Route("/predictions/{prediction}", self.create_idempotent, methods=["PUT"]),
            Route("/predictions/{prediction}/cancel", self.cancel, methods=["POST"]),
            Route("/health-check", self.health_check),
            Route("/openapi.json", self.of_any_worker),
            Route("/", self.of_any_worker),
        )

    async def __call__(self, request: Request) -> Response:
        """Ray calls this with every request, and cancels it when the client hangs up."""
        other_methods = False
        for route in self._routes:
            match, scope = route.matches(request.scope)
            if match == Match.FULL:
                request.scope.update(scope)
                answer: Answer = await route.endpoint(request)
                headers = {"Retry-After": str(answer.retry_after)} if answer.retry_after else None
                return Response(answer.body, answer.status, headers, answer.content_type)
            other_methods |= match == Match.PARTIAL
        return Response(status_code=405 if other_methods else 404)

    async def create(self, request: Request) -> Answer:
        """As a single server does, but for the 409."""
        raw = await request.body()
        body = read_body(raw)
        return await self._predict(request, raw, body, body.id or new_id())

    async def create_idempotent(self, request: Request) -> Answer:
        """The same with the client's id; with an id that is under way, the state of that prediction."""
        raw = await request.body()
        return await self._predict(request, raw, read_body(raw), request.path_params["prediction"])

    async def cancel(self, request: Request) -> Answer:
        """Wherever it is: in the queue or at a worker."""
        ticket = TICKETS.get(request.path_params["prediction"])
        return Answer(404, JSON, b"{}") if ticket is None else await self._cancel(ticket)

    async def health_check(self, request: Request) -> Answer:
        """Of the fleet, in the form of a server's: READY when the next prediction is taken, BUSY when it is refused."""
        if time.monotonic() > self._state_until:
            self._state = await asyncio.to_thread(fleet_state)
            self._state_until = time.monotonic() + STATE_SECONDS
        running = sum(ticket.worker is not None for ticket in TICKETS.values())
        state = self._state | {"queue": {"waiting": len(TICKETS) - running, "running": running}}
        if state["status"] == "READY" and self._full():
            state = state | {"status": "BUSY"}
        one = await self._same_everywhere("/health-check") if state.get("workers", {}).get("running") else None
        return Answer(200, JSON, to_json((json.loads(one.body) if one else {}) | state))

    async def of_any_worker(self, request: Request) -> Answer:
        """What all of them would say."""
        return await self._same_everywhere(request.url.path) or _unavailable("No worker runs yet.", 1)

    async def _predict(self, request: Request, raw: bytes, body: Body, id_: str) -> Answer:
        if len(raw) > MOST_BYTES:
            return Answer(413, "text/plain; charset=utf-8", b"length limit exceeded")
        if not VALID_ID.fullmatch(id_):
            return _unprocessable("prediction ID must be 1 to 64 of the characters A-Z a-z 0-9 _ -")
        if id_ in TICKETS:
            return _state_of(TICKETS[id_])
        if self._full():
            return self._refused("The queue is full: try again later.")
        ticket = TICKETS[id_] = Ticket(id_, body.weights, body.input)
        path = "/predictions" if request.method == "POST" else f"/predictions/{id_}"
        sent = request.method, path, request.headers.get("content-type", ""), raw, body.additions(id_, request.method)
        if request.headers.get("prefer") == ASYNCHRONOUS and self._inputs.is_valid(body.input):
            self._in_background(self._run_and_tell(ticket, body, sent))
            return Answer(202, JSON, to_json({"id": id_, "status": "starting"}))
        task = self._in_background(self._run(ticket, body, sent))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:  # the client has hung up
            self._in_background(self._cancel(ticket))
            raise

    async def _run_and_tell(self, ticket: Ticket, body: Body, sent: tuple[Any, ...]) -> Answer:
        """For a client that does not wait: what a server refuses, it tells no webhook."""
        answer = await self._run(ticket, body, sent)
        if 400 <= answer.status < 500:
            await send_webhook(body, failed(ticket.id, answer.body.decode(errors="replace")))
        return answer

    async def _run(self, ticket: Ticket, body: Body, sent: tuple[Any, ...]) -> Answer:
        """One prediction from the queue to its answer; never an error."""
        try:
            for _ in range(TRIES):
                answer = await self._try(ticket, sent)
                if answer is not None:
                    return answer
                ticket.wait_again()
                self._metrics.retried()
            own = failed(ticket.id, LOST)
        except asyncio.CancelledError:
            if ticket.overdue:
                self._in_background(send_webhook(body, failed(ticket.id, LATE)))
                return self._refused(LATE)
            if not ticket.canceled:  # by us, while it waited: else the front itself ends
                raise
            own = canceled(ticket.id)
        finally:
            TICKETS.pop(ticket.id, None)
        self._in_background(send_webhook(body, own))
        return Answer(200, JSON, to_json(own))

    async def _try(self, ticket: Ticket, sent: tuple[Any, ...]) -> Answer | None:
        """A worker's answer; None where it was lost. Raises `CancelledError` where the wait for one was ended."""
        if ticket.canceled:
            raise asyncio.CancelledError
        arrived = time.monotonic()
        call = self._call(ticket, sent)
        ticket.leave_queue = call.cancel
        overdue = asyncio.get_running_loop().call_later(self._longest_wait, ticket.give_up)
        try:
            answer: Answer = await call
        except RequestCancelledError:
            raise asyncio.CancelledError from None
        except (RayError, RayServeException):
            return None
        else:
            seconds = time.monotonic() - ticket.began
            self._mean_seconds += (seconds - self._mean_seconds) * (0.1 if self._mean_seconds else 1.0)
            self._metrics.ended(ticket.worker or "", ticket.began - arrived, seconds)
            return answer
        finally:
            overdue.cancel()
            ticket.release()

    def _call(self, ticket: Ticket, sent: tuple[Any, ...]) -> DeploymentResponse:
        return self._workers.predict.remote(ticket.id, *sent)

    async def _cancel(self, ticket: Ticket) -> Answer:
        ticket.cancel()
        deadline = time.monotonic() + CANCEL_SECONDS
        while ticket.worker and ticket.id in TICKETS and time.monotonic() < deadline:
            path = f"/predictions/{ticket.id}/cancel"
            answer = await self._ask("POST", path, worker=ticket.worker)
            if answer is not None and answer.status == 200:
                return answer
            await asyncio.sleep(CANCEL_PAUSE)
        return Answer(200, JSON, b"{}")

    async def _same_everywhere(self, path: str) -> Answer | None:
        if path not in self._kept and (answer := await self._ask("GET", path)):
            self._kept[path] = answer
        return self._kept.get(path)

    async def _ask(self, method: str, path: str, worker: str = "") -> Answer | None:
        """A worker's answer, that one's if one is named; None when there is none."""
        try:
            async with asyncio.timeout(ASK_SECONDS):
                answer: Answer = await self._workers.ask.remote(method=method, path=path, worker=worker)
                return answer
        except (RayError, RayServeException, TimeoutError):
            return None

    def _refused(self, why: str) -> Answer:
        self._metrics.refused()
        seconds = math.ceil(self._mean_seconds * len(TICKETS) / max(len(WORKERS), 1))
        return _unavailable(why, min(max(seconds, 1), LONGEST_RETRY_AFTER))

    def _full(self) -> bool:
        return len(TICKETS) - len(WORKERS) >= self._longest_queue

    def _in_background(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        # in a context of its own: in the request's, Ray would cancel every call that follows when the client hangs up
        task = asyncio.get_running_loop().create_task(work, context=Context())
        self._tasks.add(task)  # the loop itself keeps none alive
        task.add_done_callback(self._tasks.discard)
        return task


def _state_of(ticket: Ticket) -> Answer:
    """Of a prediction that is under way. A server would say more, but could take the question for a new prediction."""
    status = "processing" if ticket.worker else "starting"
    state = {"id": ticket.id, "input": ticket.input, "logs": "", "metrics": {}, "status": status}
    return Answer(202, JSON, to_json(state))


def _unavailable(why: str, retry_after: int) -> Answer:
    return Answer(503, JSON, to_json({"error": why, "status": "failed"}), retry_after)


def _unprocessable(why: str) -> Answer:
    """As coglet says it of an id that does not agree with the address."""
    return Answer(422, JSON, to_json({"detail": [{"loc": ["body", "id"], "msg": why, "type": "value_error"}]}))
