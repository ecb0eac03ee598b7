"""The fleet as an application of Ray Serve, for `script/fleet`, `serve run fleet.app:build` and a RayService."""

from pathlib import Path
from typing import Any

import ray
from pydantic import BaseModel
from ray import serve
from ray.serve.config import AutoscalingConfig, RequestRouterConfig

from fleet.front import Front
from fleet.router import AffinityRouter
from fleet.state import FRONT, WORKER
from fleet.worker import Worker
from tools import ROOT
from tools.cog_schema import openapi_document

CALLS_BESIDE = 32  # that a worker answers while it is at a prediction: cancelling, its state
MOST_CALLS = 100_000  # that the front has open: its own bound is the queue's
HEALTH_PERIOD, HEALTH_TIMEOUT = 5.0, 20.0  # seconds
CONSTRUCTOR_TRIES = 2
# The router is called on the front's own event loop: its tickets are shared, and a call to another thread costs time.
FRONT_ENVIRONMENT = {"RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0"}
FRONT_PLACE = {"node:__internal_head__": 0.001}  # the machine whose loss ends the fleet anyway, so no other one does


class Options(BaseModel):
    """Of a fleet; times in seconds."""

    workers: int = 1  # at the start
    min_workers: int | None = None  # None: as many as at the start
    max_workers: int | None = None  # None: as many as at the start
    longest_queue: int = 1000
    longest_wait: float = 600.0
    longest_prediction: float = 3600.0
    swap_seconds: float = 1.0  # what merging other LoRAs costs: the longest wait for a worker that has the wanted
    scale_up_after: float = 10.0
    scale_down_after: float = 600.0
    project: str = str(ROOT)  # the folder with the predict.py that workers serve
    generation: int = 0  # another one replaces all workers


def build(options: Options) -> serve.Application:
    """The front, which is the ingress, and the workers that it is bound to. Ray must be running."""
    worker = serve.deployment(
        Worker,
        name=WORKER,
        ray_actor_options=worker_resources(),
        max_ongoing_requests=CALLS_BESIDE,
        health_check_period_s=HEALTH_PERIOD,
        health_check_timeout_s=HEALTH_TIMEOUT,
        graceful_shutdown_timeout_s=options.longest_prediction,
        graceful_shutdown_wait_loop_s=0.5,
        max_constructor_retry_count=CONSTRUCTOR_TRIES,
        request_router_config=RequestRouterConfig(
            request_router_class=AffinityRouter, request_router_kwargs={"swap_seconds": options.swap_seconds}
        ),
        **_size(options),
    ).bind(options.project, options.longest_prediction, options.generation)
    return serve.deployment(
        Front,
        name=FRONT,
        max_ongoing_requests=MOST_CALLS,
        ray_actor_options={"num_cpus": 0, "resources": FRONT_PLACE, "runtime_env": {"env_vars": FRONT_ENVIRONMENT}},
    ).bind(worker, input_schema(Path(options.project)), options.longest_queue, options.longest_wait)


def input_schema(project: Path) -> dict[str, Any]:
    """Of our predict.py's inputs, as JSON schema; another project's may be anything."""
    if project != ROOT:
        return {"type": "object"}
    document = openapi_document((project / "predict.py").read_text())
    return {"$ref": "#/components/schemas/Input", "components": document["components"]}


def worker_resources() -> dict[str, float]:
    """One GPU and its share of its machine's processors; where the cluster has no GPU, one processor."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    shares = [node.get("CPU", 1) // node["GPU"] for node in nodes if node.get("GPU")]
    return {"num_gpus": 1, "num_cpus": max(1, min(shares))} if shares else {"num_cpus": 1}


def _size(options: Options) -> dict[str, object]:
    least, most = options.min_workers, options.max_workers
    if least is None and most is None:
        return {"num_replicas": options.workers}
    least = options.workers if least is None else least
    return {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=least,
            max_replicas=max(options.workers if most is None else most, 1),
            initial_replicas=max(options.workers, least),
            target_ongoing_requests=1,
            look_back_period_s=options.scale_up_after,
            metrics_interval_s=min(1.0, options.scale_up_after / 2),
            upscale_delay_s=options.scale_up_after,
            downscale_delay_s=options.scale_down_after,
        )
    }
