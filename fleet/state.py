"""What Ray knows of the fleet, in the words of Cog's /health-check."""

import re
from typing import Any

from ray import serve

APP, WORKER, FRONT = "flux-lora", "Worker", "Front"
FAILED = ("DEPLOY_FAILED", "UNHEALTHY")


def fleet_state() -> dict[str, Any]:
    """The keys `status` and `workers`, and `setup` where it has failed. It asks Ray's controller, and waits for it."""
    app = serve.status().applications.get(APP)
    deployment = app.deployments.get(WORKER) if app else None
    if app is None or deployment is None:
        return {"status": "STARTING", "workers": {"running": 0, "starting": 0}}
    counts = {str(getattr(state, "value", state)): count for state, count in deployment.replica_states.items()}
    running, starting = counts.get("RUNNING", 0), counts.get("STARTING", 0)
    state: dict[str, Any] = {"status": "READY", "workers": {"running": running, "starting": starting}}
    if running:
        return state
    if deployment.status in FAILED:
        return state | {
            "status": "SETUP_FAILED",
            "setup": {"status": "failed", "logs": setup_error(deployment.message)},
        }
    if starting or deployment.status != "HEALTHY":
        return state | {"status": "STARTING"}
    return state  # scaled to none: the next prediction starts one


def setup_error(message: str) -> str:
    """The sentence of the server's error, out of Ray's message with its traceback."""
    match = re.search(r"ServerError: (.+?)(?=\n\S*Traceback|\n\n|\Z)", message, re.DOTALL)
    return match[1].strip() if match else message.strip()
