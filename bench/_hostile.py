"""What strangers send: hostile files, answers of hostile servers, addresses of the operator's own network."""

import base64
import io
import random
import re
import socket
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
from PIL import Image
from safetensors.numpy import save

SMALL = {
    "prompt": "a red circle", "aspect_ratio": "custom", "width": 256, "height": 256, "num_inference_steps": 2,
    "seed": 5, "output_format": "png", "disable_safety_checker": True,
}  # fmt: skip
Inputs = dict[str, Any]


def private_requests(url: str) -> Iterator[tuple[str, Inputs]]:
    """Addresses of this machine and of its network, in every input that takes one."""
    port = url.rpartition(":")[2]
    for host in ("127.0.0.1", "localhost", "2130706433", "0x7f.1", "0.0.0.0", "[::ffff:127.0.0.1]", "[64:ff9b::7f00:1]",
                 "[fe80::1]", "10.0.0.1", "169.254.169.254", "168.63.129.16", "metadata.google.internal"):  # fmt: skip
        address = f"http://{host}:{port}/x"
        yield f"image at {host}", {**SMALL, "image": address}
        yield f"mask at {host}", {**SMALL, "image": picture(), "mask": address.replace("http:", "https:")}
        yield f"LoRA at {host}", {**SMALL, "extra_lora": f"{address}.safetensors"}


def hostile_requests(url: str) -> Iterator[tuple[str, Inputs]]:
    for name in ANSWERS:
        yield name, {**SMALL, "replicate_weights": f"{url}/{name}.safetensors"}
        yield f"{name} as a picture", {**SMALL, "image": f"{url}/{name}.png"}
    yield "a picture that drips", {**SMALL, "image": f"{url}/{DRIPS}.png"}
    for name, content in FILES.items():
        uri = f"data:application/octet-stream;base64,{base64.b64encode(content()).decode()}"
        yield name, {**SMALL, "replicate_weights": uri}
        yield f"{name} as a picture", {**SMALL, "image": uri}
    yield "a prompt of 8 MB", {**SMALL, "prompt": "a " * 4_000_000}
    yield "a port that is none", {**SMALL, "extra_lora": "http://example.com:65536/x.safetensors"}
    yield "control characters", {**SMALL, "extra_lora": "\x1b[31m\x00/\n"}


def picture() -> str:
    content = io.BytesIO()
    Image.new("RGB", (256, 256), "navy").save(content, "PNG")
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"


def lora(metadata: dict[str, str] | None = None, value: float = 0.0) -> bytes:
    weight = np.full((4, 16), value, np.float32)
    return save({"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": weight}, metadata)


def pair(value: float) -> bytes:
    """For the demo model: what fits into a weight, but not what the weight makes of a picture."""
    module = "transformer.transformer_blocks.0.ff.net.2"
    up, down = np.full((144, 4), value, np.float32), np.full((4, 576), value, np.float32)
    return save({f"{module}.lora_B.weight": up, f"{module}.lora_A.weight": down})


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
    "factors that are huge when multiplied": lambda: pair(1e18),
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


DRIPS = "drips"  # one byte a second, for ever


@contextmanager
def hostile_server() -> Iterator[tuple[str, list[bytes]]]:
    """It answers /<name>.<anything> with that one of `ANSWERS`. Gives its address, on loopback, and the list of what it
    is asked."""
    asked: list[bytes] = []

    def answer(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            asked.append(connection.recv(65536))
            match = re.match(rb"GET /(\w[\w-]*)", asked[-1])
            name = match[1].decode() if match else ""
            if name == DRIPS:
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\nContent-Length: 99999\r\n\r\n")
                while True:
                    connection.sendall(b"x")
                    time.sleep(1)
            connection.sendall(ANSWERS.get(name, b""))

    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with suppress(OSError):
                while True:
                    threading.Thread(target=answer, args=(listener.accept()[0],), daemon=True).start()

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", asked
