"""Ray Serve's place for a policy of one's own: it asks which worker is to take a request, and waits for the answer."""

import asyncio
import time
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from fleet import tickets  # whole: Ray copies this module's own names, and the registers in it have to be the front's
from fleet.dispatch import Dispatcher
from fleet.metrics import QueueMetrics

MOST_WAITING = 100_000  # more than any queue has: all that wait are looked at


class AffinityRouter(RequestRouter):
    """One prediction a worker at a time, given by a `Dispatcher`.

    A call whose first argument is the id of a ticket waits until a worker is given to that. A call with the keyword
    `worker` goes to that worker, busy or not, and any other call to any.
    """

    max_num_routing_tasks_cap = MOST_WAITING

    @property
    def max_num_routing_tasks(self) -> int:
        """One task for each request: Ray's twice as many as workers would hide the rest of the queue."""
        return self.max_num_routing_tasks_cap

    @property
    def supports_rejection_protocol(self) -> bool:
        """No: nobody else gives a worker anything, so that none needs to be asked whether it has room."""
        return False

    def initialize_state(self, swap_seconds: float) -> None:
        """Called by Ray with the deployment's `request_router_kwargs`."""
        self._dispatcher = Dispatcher(swap_seconds)
        self._given: dict[str, asyncio.Future[str]] = {}  # the worker by prediction, from the queue to the answer
        self._look_again: asyncio.TimerHandle | None = None
        self._metrics = QueueMetrics()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ray sends the request to the one that is returned."""
        arguments: list[Any] = pending_request.args if pending_request else []
        if arguments and (ticket := tickets.TICKETS.get(arguments[0])):
            replica = self._replica(await self._wait_for_worker(ticket))
            return [[replica]] if replica else []  # gone meanwhile: Ray asks again
        named = self._replica(pending_request.kwargs.get("worker", "")) if pending_request else None
        return [[named]] if named else [candidate_replicas]

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Called by Ray with all that run."""
        super().update_replicas(replicas)
        self._workers_changed()

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """Called by Ray when a request finds out, before its controller does."""
        super().on_replica_actor_died(replica_id)
        self._workers_changed()

    async def _wait_for_worker(self, ticket: tickets.Ticket) -> str:
        self._release(ticket)  # what an earlier try holds
        given = self._given[ticket.id] = asyncio.get_running_loop().create_future()
        ticket.release = lambda: self._release(ticket)
        self._dispatcher.add(ticket.id, ticket.weights)
        self._look()
        try:
            worker: str = await given
        except asyncio.CancelledError:
            self._release(ticket)
            raise
        ticket.begin(worker)
        return worker

    def _release(self, ticket: tickets.Ticket) -> None:
        given = self._given.pop(ticket.id, None)
        if given is not None and given.done() and not given.cancelled():
            self._dispatcher.finished(given.result(), ticket.id, time.monotonic())
        self._dispatcher.remove(ticket.id)
        self._look()

    def _look(self) -> None:
        """Give what there is to give, and look again when waiting for a better worker ends."""
        now = time.monotonic()
        for prediction, worker, moves in self._dispatcher.assign(now):
            given = self._given[prediction]
            if given.cancelled():  # a moment ago, and in another it will be released
                self._dispatcher.finished(worker, prediction, now)
            else:
                self._metrics.begun(worker, moves)
                given.set_result(worker)
        self._metrics.queue(len(self._dispatcher.waiting))
        if self._look_again:
            self._look_again.cancel()
        seconds = self._dispatcher.next_look(now)
        self._look_again = None if seconds is None else asyncio.get_running_loop().call_later(seconds, self._look)

    def _workers_changed(self) -> None:
        tickets.WORKERS.clear()
        tickets.WORKERS.update(id_.unique_id for id_ in self.curr_replicas)
        self._dispatcher.set_workers(tickets.WORKERS, time.monotonic())
        self._look()

    def _replica(self, worker: str) -> RunningReplica | None:
        replicas = self.curr_replicas.values()
        return next((replica for replica in replicas if replica.replica_id.unique_id == worker), None)
