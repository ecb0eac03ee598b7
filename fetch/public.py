"""Connections to public addresses only: a stranger's reference must not make this process talk to its own network.

The check is made on the very addresses that a connection is opened to, so that a name which resolves differently the
next moment gains nothing.
"""

import ipaddress
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

from lora.errors import LoraError

NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # RFC 6052: the last four bytes are an IPv4 address


def is_public(address: str) -> bool:
    """Whether this IP address means the same machine to the whole internet, whatever it is wrapped in."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if ip in NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
        if ip.is_site_local:
            return False
    return ip.is_global and not ip.is_multicast


class PublicAdapter(HTTPAdapter):
    """What `requests` needs to connect to public addresses only. Raises `LoraError` for others."""

    def init_poolmanager(self, *arguments: Any, **options: Any) -> None:
        super().init_poolmanager(*arguments, **options)
        self.poolmanager.pool_classes_by_scheme = {"http": _PublicPool, "https": _PublicSecurePool}

    def send(self, request: requests.PreparedRequest, *arguments: Any, **options: Any) -> requests.Response:
        """A proxy resolves names itself: here only a host that is plainly private can be refused."""
        if select_proxy(request.url or "", options.get("proxies")):
            host = urlsplit(request.url or "").hostname or ""
            private = host == "localhost" or host.endswith(".localhost")
            with suppress(ValueError):  # a name, not an IP address
                private = not is_public(host)
            if private:
                raise _private(host)
        return super().send(request, *arguments, **options)


def _private(host: str) -> LoraError:
    return LoraError(
        f"{host} is on a private network, which is refused: use a public address, or set LORA_ALLOW_PRIVATE_HOSTS=1."
    )


class _PublicConnection(HTTPConnection):
    def _new_conn(self) -> socket.socket:
        """Resolve the name once, check every address, connect to one of those very addresses."""
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
