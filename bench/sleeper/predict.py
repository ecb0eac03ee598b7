"""A predictor that only takes time, for measurements and tests of the fleet: no picture, no torch."""

import os
import signal
import time
from pathlib import Path

from cog import BaseRunner

ANCESTORS = ("predictor", "server", "worker")  # this process, coglet's, and the fleet's that started that


class Predictor(BaseRunner):
    """Sleeps for as long as a prediction takes, and longer when the LoRA is another than before."""

    def setup(self) -> None:
        """Fails where a test wants that."""
        if reason := os.environ.get("SLEEPER_SETUP_ERROR"):
            raise RuntimeError(reason)
        self.held: str | None = None

    def run(  # noqa: PLR0913, PLR0917 - named by the clients
        self,
        prompt: str = "",
        replicate_weights: str = "",
        seconds: float = 0.0,
        swap_seconds: float = 0.0,
        seed: int = 0,
        kill: str = "",
        once: str = "",
    ) -> str:
        """The prompt and the seed, after `seconds` and, for another LoRA, `swap_seconds`.

        `kill` names a process that dies instead, `nobody` that all stand still; with a file `once`, only while that is
        not there.
        """
        swapped = replicate_weights != self.held
        self.record_metric("swapped", int(swapped))
        self.record_metric("server", os.getppid())
        if kill and not (once and Path(once).exists()):
            if once:
                Path(once).touch()
            while kill == "nobody":
                time.sleep(1)
            os.kill(_ancestor(ANCESTORS.index(kill)), signal.SIGKILL)
        end = time.monotonic() + seconds + (swap_seconds if swapped and self.held is not None else 0.0)
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 0.05))  # short, so that canceling is noticed
        self.held = replicate_weights
        return f"{prompt} {seed}"


def _ancestor(generations: int) -> int:
    pid = os.getpid()
    for _ in range(generations):
        status = Path(f"/proc/{pid}/status").read_text()
        pid = int(status.split("PPid:")[1].split()[0])
    return pid
