"""What stands around the predictor in Cog's server: the watchdog, the sweeping of leftovers, and, where the operator
wants it, the refusal of addresses of inputs."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

from fetch.network import keep_proxies
from service.leftovers import Leftovers
from service.watchdog import Watchdog
from settings import Settings

REFUSAL = "This server takes image and mask only as data: URIs"
PROXY_VARIABLES = ("http_proxy", "https_proxy", "all_proxy")


class Guards:
    """Make them at the end of `setup()`."""

    def __init__(self, settings: Settings) -> None:
        self._leftovers = Leftovers()
        if settings.inputs_as_data_only:
            refuse_addresses()
        self._watchdog = Watchdog(settings.request_timeout, settings.input_timeout)

    @contextmanager
    def request(self) -> Iterator[None]:
        """Within, a request runs."""
        with self._watchdog.request():
            self._leftovers.sweep()
            yield


def refuse_addresses() -> None:
    """From now on, whoever in this process opens an address through the proxies of the environment, as Cog does with
    those of inputs, is refused by a proxy of ours, before a name is resolved.

    Our own fetching of LoRAs keeps to the proxies that were there before.
    """
    keep_proxies()
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), _Refusing)
    Thread(target=proxy.serve_forever, name="refusing proxy", daemon=True).start()
    for variable in PROXY_VARIABLES:
        for name in (variable, variable.upper()):
            os.environ[name] = f"http://127.0.0.1:{proxy.server_address[1]}"
    for name in ("no_proxy", "NO_PROXY"):
        os.environ.pop(name, None)


class _Refusing(BaseHTTPRequestHandler):
    timeout = 10

    def do_GET(self) -> None:
        self.send_error(403, REFUSAL)

    do_CONNECT = do_GET  # noqa: N815 - for https

    def log_message(self, *_: object) -> None:
        pass
