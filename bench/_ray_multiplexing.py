"""The fleet with Ray's own router and its multiplexing by model id in place of ours, for bench/fleet.py to compare.

It runs in the fleet's environment and takes what script/fleet takes.
"""

import sys
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentResponse

from fleet import __main__ as command
from fleet.app import HEALTH_PERIOD, HEALTH_TIMEOUT, MOST_CALLS, Options, input_schema, worker_resources
from fleet.front import Front
from fleet.tickets import Ticket
from fleet.worker import Answer, Worker


class MultiplexedWorker(Worker):
    """Tells Ray which weights it has: the last ones."""

    @serve.multiplexed(max_num_models_per_replica=1)  # type: ignore[untyped-decorator]
    async def load(self, weights: str) -> str:
        return weights

    async def predict(self, *sent: Any) -> Answer:
        await self.load(serve.get_multiplexed_model_id())
        return await super().predict(*sent)


class MultiplexedFront(Front):
    def _call(self, ticket: Ticket, sent: tuple[Any, ...]) -> DeploymentResponse:
        handle = self._workers.options(multiplexed_model_id=str(ticket.weights))
        return handle.predict.remote(ticket.id, *sent)


def build(options: Options) -> serve.Application:
    worker = serve.deployment(
        MultiplexedWorker,
        name="Worker",
        num_replicas=options.workers,
        ray_actor_options=worker_resources(),
        max_ongoing_requests=1,
        health_check_period_s=HEALTH_PERIOD,
        health_check_timeout_s=HEALTH_TIMEOUT,
    ).bind(options.project, options.longest_prediction, options.generation)
    front = serve.deployment(
        MultiplexedFront, name="Front", max_ongoing_requests=MOST_CALLS, ray_actor_options={"num_cpus": 0}
    )
    return front.bind(worker, input_schema(Path(options.project)), options.longest_queue, options.longest_wait)


if __name__ == "__main__":
    command.build = build  # type: ignore[attr-defined]
    sys.exit(command.main())
