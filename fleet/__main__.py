"""Serve predictions from several workers, one GPU each, until Ctrl-C. SIGHUP replaces the workers one after another."""

import argparse
import os
import signal
import sys
import threading
from typing import Any

import ray
from ray import serve

from fleet.app import Options, build
from fleet.state import APP, fleet_state

POLL_SECONDS = 0.5
METRICS_PORT = 8080
QUIET = {"log_level": "WARNING", "enable_access_log": False}


class SetupError(RuntimeError):
    """The workers do not start; the message is what the predictor says."""


def main() -> int:
    """Returns the exit code: 0 after Ctrl-C or SIGTERM."""
    arguments = _parser().parse_args()
    options = _options(arguments)
    restart = threading.Event()
    signal.signal(signal.SIGHUP, lambda *_: restart.set())
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell would ignore it
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    _start_ray(arguments, options)
    try:
        serve.start(
            http_options={"host": arguments.host, "port": arguments.port, "request_timeout_s": None},
            logging_config=QUIET,
        )
        _deploy(options)
        _say(f"Serving at http://{arguments.host}:{arguments.port}/predictions; Ctrl-C stops.")
        while True:
            if restart.wait(POLL_SECONDS):
                restart.clear()
                options.generation += 1
                _deploy(options)
                _say("All workers are new.")
    except SetupError as error:
        _say(f"fleet error: {error}")
        return 1
    except KeyboardInterrupt:
        return 0
    finally:
        serve.shutdown()
        ray.shutdown()


def _parser() -> argparse.ArgumentParser:
    defaults = Options()
    parser = argparse.ArgumentParser(prog="script/fleet", description=__doc__)
    add = parser.add_argument
    add("--workers", type=int, metavar="N", help="at the start (default: one for each GPU, two without a GPU)")
    add("--min", type=int, dest="min_workers", metavar="A", help="the fewest that a quiet fleet shrinks to; may be 0")
    add("--max", type=int, dest="max_workers", metavar="B", help="the most that a long queue makes it grow to")
    add("--host", default="127.0.0.1", help="the address to listen on (default: 127.0.0.1)")
    add("--port", type=int, default=int(os.environ.get("PORT", "5000")), help="(default: 5000)")
    add(
        "--address",
        default=os.environ.get("RAY_ADDRESS"),
        help="of a Ray cluster to run on, auto for that of `ray start` (default: this machine)",
    )
    add("--metrics-port", type=int, default=METRICS_PORT, help=f"for Prometheus (default: {METRICS_PORT})")
    for name, text in (
        ("longest_queue", "predictions that may wait; beyond it the answer is 503"),
        ("longest_wait", "seconds that one may wait for a worker; beyond it the answer is 503"),
        ("longest_prediction", "seconds after which a worker at one prediction is replaced"),
        ("swap_seconds", "what merging other LoRAs costs; so long a prediction waits for a worker that has its LoRAs"),
        ("scale_up_after", "seconds of a long queue before there are more workers"),
        ("scale_down_after", "seconds of a short one before there are fewer"),
    ):
        default = getattr(defaults, name)
        option = f"--{name.replace('_', '-')}"
        add(option, type=type(default), default=default, metavar="N", help=f"{text} (default: {default:g})")
    add("--project", default=defaults.project, help=argparse.SUPPRESS)  # the benchmark's predictor
    return parser


def _options(arguments: argparse.Namespace) -> Options:
    given = {name: getattr(arguments, name) for name in Options.model_fields if hasattr(arguments, name)}
    return Options(**given | {"workers": arguments.workers or 0})


def _start_ray(arguments: argparse.Namespace, options: Options) -> None:
    """Join the cluster that is named, else be one of this machine alone."""
    settings: dict[str, Any] = {"namespace": "flux-lora", "logging_level": "WARNING"}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")  # into Ray's own folder; the predictors' lines are shown
    if arguments.address:
        ray.init(address=arguments.address, **settings)
    else:
        slots = max(options.workers, options.min_workers or 0, options.max_workers or 0, os.cpu_count() or 1)
        ray.init(
            address="local",
            num_cpus=slots,
            include_dashboard=False,
            _node_ip_address="127.0.0.1",
            _metrics_export_port=arguments.metrics_port,
            **settings,
        )
    if options.workers == 0:
        options.workers = int(ray.cluster_resources().get("GPU", 0)) or 2


def _deploy(options: Options) -> None:
    """Start or replace the workers, and wait for them. Raises `SetupError`."""
    try:
        serve.run(build(options), name=APP, route_prefix="/", logging_config=QUIET)
    except RuntimeError as error:  # Ray has given up
        raise SetupError(fleet_state().get("setup", {}).get("logs") or str(error)) from None


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
