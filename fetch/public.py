"""Connections to public addresses only: a stranger's reference must not make this process talk to its own network.

The check is made on the very addresses that a connection is opened to, so that a name which resolves differently the
next moment gains nothing.
"""

import socket
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from requests.utils import select_proxy
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import HTTPError, NameResolutionError

from fetch.addresses import is_private_host, is_public
from lora.errors import LoraError


class PublicAdapter(HTTPAdapter):
    """What `requests` needs to connect to public addresses only. Raises `LoraError` for others."""

    def init_poolmanager(self, *arguments: Any, **options: Any) -> None:
        super().init_poolmanager(*arguments, **options)
        self.poolmanager.pool_classes_by_scheme = {"http": _PublicPool, "https": _PublicSecurePool}

    def send(self, request: requests.PreparedRequest, *arguments: Any, **options: Any) -> requests.Response:
        """A proxy resolves names itself: here only a host that is plainly private can be refused."""
        if select_proxy(request.url or "", options.get("proxies")):
            host = urlsplit(request.url or "").hostname or ""
            if is_private_host(host):
                raise _private(host)
        return super().send(request, *arguments, **options)


def _private(host: str) -> LoraError:
    return LoraError(
        f"{host} is on a private network, which is refused: use a public address, or set LORA_ALLOW_PRIVATE_HOSTS=1."
    )


class _PublicConnection(HTTPConnection):
    def _new_conn(self) -> socket.socket:
        """Resolve the name once, check every address, connect to one of those very addresses."""
        if is_private_host(self._dns_host):
            raise _private(self._dns_host)
        try:
            found = socket.getaddrinfo(self._dns_host, self.port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            reason = error if isinstance(error, socket.gaierror) else socket.gaierror(str(error))
            raise NameResolutionError(self.host, self, reason) from None
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        name = self._dns_host
        if not all(map(is_public, addresses)):
            raise _private(name)
        try:
            for address in addresses[:-1]:
                self._dns_host = address
                with suppress(HTTPError):
                    return super()._new_conn()
            self._dns_host = addresses[-1]
            return super()._new_conn()
        finally:
            self._dns_host = name


class _PublicSecureConnection(_PublicConnection, HTTPSConnection):
    pass


class _PublicPool(HTTPConnectionPool):
    ConnectionCls = _PublicConnection


class _PublicSecurePool(HTTPSConnectionPool):
    ConnectionCls = _PublicSecureConnection
