"""Hostile files, servers, cancels and kills against Cog's server, with canaries between: what does not hold?"""

import base64
import io
import os
import random
import re
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import requests
from PIL import Image

from bench._common import Goal, announce, benchmark_parser, judge, table
from bench._hostile import SMALL, Inputs, hostile_requests, hostile_server, picture, private_requests
from tools.server import CogServer, ServerError, cog_server, wait_until_idle

SECONDS = (
    570.0  # of all phases together; what is not reached in its share is left out, and the table says how many were
)
ANSWER_SECONDS = 90.0
INPUT_TIMEOUT = "15"  # so that a request that hangs is ended soon
WARM_UP, FLAT_REQUESTS, CANCELS, KILLS = 60, 500, 1000, 3


class Service:
    """The server, started anew when it has ended, as Docker would."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._environment, self._stack = environment, ExitStack()
        self.starts, self.unanswered, self.wrong_canaries = 0, 0, 0
        self.canary: str | None = None
        self.start()

    def start(self) -> None:
        self.close()
        self.cog: CogServer = self._stack.enter_context(cog_server(self._environment))
        self.starts += 1

    def close(self) -> None:
        self._stack.close()
        self._stack = ExitStack()

    def predict(self, inputs: Inputs, name: str | None = None) -> Inputs | None:
        """The answer; None where the server ended instead, which is started again then."""
        deadline = time.monotonic() + ANSWER_SECONDS
        while time.monotonic() < deadline and self.cog.process.poll() is None:
            answer = self._ask(inputs, name)
            if answer and "status" in answer and answer.get("error") != "Worker crashed":
                return answer
            time.sleep(0.1)  # it is busy (409), or about to end
        self.unanswered += self.cog.process.poll() is None  # neither an answer nor an end
        self.start()
        return None

    def _ask(self, inputs: Inputs, name: str | None) -> Inputs | None:
        path = f"/predictions/{name}" if name else "/predictions"
        method = requests.put if name else requests.post
        try:
            wait_until_idle(self.cog.url)
            response = method(f"{self.cog.url}{path}", json={"input": inputs}, timeout=ANSWER_SECONDS)
            answer: Inputs = response.json()
        except (requests.RequestException, ValueError):
            return None
        return None if response.status_code == 409 else answer

    def check_canary(self) -> None:
        """The same request has to give the same bytes for ever."""
        answer = self.predict(SMALL) or self.predict(SMALL)  # the second by a server that was started anew
        picture = str((answer or {}).get("output"))
        self.canary = self.canary or picture
        if picture != self.canary:
            self.wrong_canaries += 1
            shown = {name: str(value)[:300] for name, value in (answer or {}).items() if name != "output"}
            print(f"a wrong canary: {shown}", flush=True)

    def worker(self) -> int:
        tasks = Path(f"/proc/{self.cog.process.pid}/task").glob("*/children")
        return int(" ".join(file.read_text() for file in tasks).split()[0])


def main() -> None:
    parser = benchmark_parser(__doc__, goals=True)
    parser.add_argument("--share", type=float, default=1.0, help="of the time and the counts (default: %(default)g)")
    options = parser.parse_args()
    announce(SECONDS * options.share)
    ends = time.monotonic() + SECONDS * options.share
    limits = {"INPUT_TIMEOUT": INPUT_TIMEOUT, "REQUEST_TIMEOUT": "60"}
    with hostile_server() as (url, reached), cleaned(Service(limits)) as service:
        private = list(private_requests(url))
        let_in = [name for name, inputs in private if not is_refused_as_private(service.predict(inputs))]
        asked = len(reached)
    with (
        hostile_server() as (url, _),
        cleaned(Service(limits | {"LORA_ALLOW_PRIVATE_HOSTS": "1"})) as service,
    ):
        service.check_canary()
        requests_ = list(hostile_requests(url)) * 2
        raw = [name for name, inputs in requests_ if not is_sentence(service.predict(inputs))]
        service.check_canary()
        growth = measure_growth(service, int(FLAT_REQUESTS * options.share))
        service.check_canary()
        for _ in range(max(1, int(KILLS * options.share))):
            os.kill(service.worker(), signal.SIGKILL)
            service.predict(SMALL)
            service.check_canary()
        restarts = service.starts
        cancels = cancel(service, int(CANCELS * options.share), ends)
        service.check_canary()
    restarts, flat = service.starts - restarts, int(FLAT_REQUESTS * options.share)
    table(
        ["what", "number"],
        [
            ["requests for private addresses", len(private)],
            ["of these not refused as such", f"{len(let_in)} {sorted(set(let_in)) or ''}"],
            ["connections to the server on loopback by them", asked],
            ["hostile requests", len(requests_)],
            ["of these not answered in a sentence", f"{len(raw)} {sorted(set(raw)) or ''}"],
            ["cancels", cancels],
            ["of these that hung, after which the watchdog ended the server", restarts],
            ["neither answered nor ended", service.unanswered],
            ["canaries that were not as before", service.wrong_canaries],
            *[[f"{name} after / before {flat} requests", f"{ratio:.3f}"] for name, ratio in growth.items()],
        ],
    )
    goals = [
        Goal("requests for private addresses not refused, and connections by them", len(let_in) + asked, 0),
        Goal("requests not answered in a sentence", len(raw), 0),
        Goal("requests neither answered nor ended", service.unanswered, 0),
        Goal("wrong canaries", service.wrong_canaries, 0),
        *[Goal(f"{name} after / before", ratio, 1.1) for name, ratio in growth.items()],
    ]
    judge(goals, check=options.check)


@contextmanager
def cleaned(service: Service) -> Iterator[Service]:
    try:
        yield service
    finally:
        service.close()


def is_sentence(answer: Inputs | None) -> bool:
    """Whether a request made a picture that is not black, or failed with one sentence and no words of Python's."""
    if answer is None or answer["status"] == "succeeded":
        return answer is not None and not any(is_black(output) for output in answer["output"])
    error = re.sub(r"^(Prediction failed: )+\w+Error: ", "", answer["error"])
    return error.isprintable() and error.endswith(".") and "not foreseen" not in error


def is_black(output: str) -> bool:
    drawn = Image.open(io.BytesIO(base64.b64decode(output.partition(",")[2])))
    return drawn.convert("L").getextrema() == (0, 0)


def is_refused_as_private(answer: Inputs | None) -> bool:
    return answer is not None and answer["status"] == "failed" and "is on a private network" in answer["error"]


def measure_growth(service: Service, count: int) -> dict[str, float]:
    """Memory, threads and descriptors of the worker after `count` requests, as a ratio of those before."""
    mixed = [SMALL, {**SMALL, "replicate_weights": "nonsense here"}, {**SMALL, "image": "data:image/png;base64,AAAA"}]
    before: dict[str, float] = {}
    for i in range(WARM_UP + count):
        if i == WARM_UP:
            before = resources(service.worker())
        service.predict(mixed[i % len(mixed)])
    after = resources(service.worker())
    return {name: after[name] / before[name] for name in after}


def resources(process: int) -> dict[str, float]:
    status = Path(f"/proc/{process}/status").read_text()
    return {
        "resident memory": float(re.search(r"VmRSS:\s+(\d+)", status)[1]),  # type: ignore[index]
        "threads": float(re.search(r"Threads:\s+(\d+)", status)[1]),  # type: ignore[index]
        "descriptors": float(len(list(Path(f"/proc/{process}/fd").iterdir()))),
    }


def cancel(service: Service, count: int, ends: float) -> int:
    """Cancel requests, with and without a picture, after any time. Returns how many there was time for."""
    image = picture()
    chance = random.Random(0)
    with ThreadPoolExecutor(1) as pool:
        for i in range(count):
            if time.monotonic() > ends:
                return i
            url, name = service.cog.url, f"cancel-{i}"
            inputs = SMALL | ({"image": image} if i % 2 else {})
            answer = pool.submit(service.predict, inputs, name)
            time.sleep(chance.choice([0.02, 0.5]) * chance.random())
            with suppress(requests.RequestException):
                requests.post(f"{url}/predictions/{name}/cancel", timeout=5)
            with suppress(ServerError):
                answer.result()
            if i % 50 == 49:
                service.check_canary()
    return count


if __name__ == "__main__":
    main()
