"""Look at what a Cog server draws: a page on this machine, until Ctrl-C."""

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import uvicorn

from play.app import build_app
from play.predictions import ServerError

ROOT = Path(__file__).parent.parent
HOST = "127.0.0.1"  # whoever reaches the page can draw with it
POLL_SECONDS = 0.2
STOP_SECONDS = 15
WEBHOOK_SECONDS = "0.1"  # between two webhooks of a server of our own; Cog's default is 0.5


def main() -> int:
    """Returns the exit code: 0 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="script/play", description=__doc__)
    parser.add_argument("--url", help="a Cog server that runs already; without it one is started")
    parser.add_argument("--port", type=int, default=7860, help="of the page; 0 takes a free one (default: 7860)")
    arguments = parser.parse_args()
    # both as exceptions, so that what was started is stopped; a background job of a shell would ignore SIGINT
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        with _listen(arguments.port) as listener, _server(arguments.url) as url:
            _serve(listener, url)
    except ServerError as error:
        _say(f"server error: {error}")
        return 1
    except KeyboardInterrupt:
        pass
    return 0


def _listen(port: int) -> socket.socket:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
    except OSError as error:
        listener.close()
        raise ServerError(f"Port {port} cannot be used ({error.strerror}): name another with --port.") from None
    return listener


@contextmanager
def _server(url: str | None) -> Iterator[str]:
    """The address of the server that is named, or of one of our own, which ends with the body."""
    if url:
        yield url.rstrip("/")
        return
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = probe.getsockname()[1]
    environment = {"COG_THROTTLE_RESPONSE_INTERVAL": WEBHOOK_SECONDS, **os.environ}
    process = subprocess.Popen([ROOT / "script" / "serve", "--port", str(port)], env=environment)
    try:
        url = f"http://{HOST}:{port}"
        _wait_until_ready(url, process)
        yield url
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()


def _wait_until_ready(url: str, process: "subprocess.Popen[bytes]") -> None:
    while process.poll() is None:
        try:
            if httpx.get(f"{url}/health-check", timeout=5).json()["status"] == "READY":
                return
        except httpx.HTTPError:
            pass
        time.sleep(POLL_SECONDS)
    raise ServerError("script/serve has ended; what it said stands above.")


def _serve(listener: socket.socket, url: str) -> None:
    """Show the page until Ctrl-C. Its files, and Gradio's, are gone afterwards."""
    address = f"http://{HOST}:{listener.getsockname()[1]}"
    with tempfile.TemporaryDirectory(prefix="flux-lora-play-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        app = build_app(url, address, Path(folder))
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
        _say(f"The page is at {address}; Ctrl-C stops.")
        if sys.platform == "darwin" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
            webbrowser.open(address)
        uvicorn.Server(config).run(sockets=[listener])


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
