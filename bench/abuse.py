"""Hostile files, servers, cancels and kills against Cog's server, with canaries between: what does not hold?"""

import base64
import io
import os
import random
import re
import signal
import socket
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import requests
from PIL import Image
from safetensors.numpy import save

from bench._common import Goal, announce, benchmark_parser, judge, table
from tools.server import CogServer, ServerError, cog_server, wait_until_idle

SECONDS = (
    570.0  # of all phases together; what is not reached in its share is left out, and the table says how many were
)
ANSWER_SECONDS = 90.0
INPUT_TIMEOUT = "15"  # so that a request that hangs is ended soon
SMALL = {
    "prompt": "a red circle", "aspect_ratio": "custom", "width": 256, "height": 256, "num_inference_steps": 2,
    "seed": 5, "output_format": "png", "disable_safety_checker": True,
}  # fmt: skip
WARM_UP, FLAT_REQUESTS, CANCELS, KILLS = 60, 500, 1000, 3
Inputs = dict[str, Any]


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
    with (
        hostile_server() as url,
        cleaned(
            Service({"INPUT_TIMEOUT": INPUT_TIMEOUT, "REQUEST_TIMEOUT": "60", "LORA_ALLOW_PRIVATE_HOSTS": "1"})
        ) as service,
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
    """Whether a request succeeded, or failed with one sentence and no words of Python's."""
    if answer is None or answer["status"] == "succeeded":
        return answer is not None
    error = re.sub(r"^(Prediction failed: )+\w+Error: ", "", answer["error"])
    return error.isprintable() and error.endswith(".") and "not foreseen" not in error


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
    picture = io.BytesIO()
    Image.new("RGB", (256, 256), "navy").save(picture, "PNG")
    image = f"data:image/png;base64,{base64.b64encode(picture.getvalue()).decode()}"
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


def hostile_requests(url: str) -> Iterator[tuple[str, Inputs]]:
    for name in ANSWERS:
        yield name, {**SMALL, "replicate_weights": f"{url}/{name}.safetensors"}
    for name, content in FILES.items():
        uri = f"data:application/octet-stream;base64,{base64.b64encode(content()).decode()}"
        yield name, {**SMALL, "replicate_weights": uri}
        yield f"{name} as a picture", {**SMALL, "image": uri}
    yield "a prompt of 8 MB", {**SMALL, "prompt": "a " * 4_000_000}
    yield "a port that is none", {**SMALL, "extra_lora": "http://example.com:65536/x.safetensors"}
    yield "control characters", {**SMALL, "extra_lora": "\x1b[31m\x00/\n"}


def lora(metadata: dict[str, str] | None = None, value: float = 0.0) -> bytes:
    weight = np.full((4, 16), value, np.float32)
    return save({"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": weight}, metadata)


def tar(names: list[str]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in names:
            archive.addfile(tarfile.TarInfo(name))
    return buffer.getvalue()


def headers_in_a_row() -> bytes:
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 10
    return (header.tobuf(tarfile.GNU_FORMAT) + b"a" * 9 + bytes(503)) * 5000 + tar(["x.safetensors"])


def png(width: int, height: int) -> bytes:
    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x01\0\0\0\0"
    return b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + head + bytes(4)


PATTERN = '{"peft_type":"LORA","r":8,"rank_pattern":{"' + r"(.|\\w)" * 36 + '!":8}}'
FILES: dict[str, Callable[[], bytes]] = {
    "nothing": lambda: b"",
    "junk": lambda: random.Random(0).randbytes(5000),
    "a pattern that never ends": lambda: lora({"adapter_config.json": PATTERN}),
    "a rank of 10^400": lambda: lora({"adapter_config.json": '{"peft_type":"LORA","r":1' + "0" * 400 + "}"}),
    "brackets 3,000 deep": lambda: lora({"adapter_config.json": "[" * 3000}),
    "huge factors": lambda: lora(value=3.4e38),
    "headers in a row": headers_in_a_row,
    "names with control characters": lambda: tar(["a\x1b\n.safetensors", "b\r.safetensors"]),
    "a tall picture": lambda: png(1, 88_000_000),
    "a bomb": lambda: png(30_000, 30_000),
}
ANSWERS: dict[str, bytes] = {  # of a server
    "length": b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\nx",
    "negative": b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\nx",
    "later": b"HTTP/1.1 503 No\r\nRetry-After: " + b"9" * 5000 + b"\r\n\r\n",
    "password": b"HTTP/1.1 302 Found\r\nLocation: http://user:secret@[::1/x\r\n\r\n",
    "inside": b"HTTP/1.1 302 Found\r\nLocation: http://169.254.169.254/x\r\n\r\n",
    "range": b"HTTP/1.1 206 OK\r\nContent-Range: bytes 0-9/5\r\n\r\n",
    "no-http": b"\x00\xff" * 5000,
}


@contextmanager
def hostile_server() -> Iterator[str]:
    """It answers /<name>.safetensors with that one of `ANSWERS`, on loopback, which the service may reach here."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection, suppress(OSError):
                        name = re.match(rb"GET /(\w[\w-]*)", connection.recv(65536))
                        connection.sendall(ANSWERS.get(name[1].decode() if name else "", b""))

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


if __name__ == "__main__":
    main()
