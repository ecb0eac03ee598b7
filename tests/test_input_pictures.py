"""Where the pictures of a request come from: out of data: URIs, and from addresses under the rules that LoRAs have."""

import base64
import io
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
from PIL import Image

from fetch import pictures
from fetch.pictures import fetch_picture
from service.errors import InputError
from settings import Settings, read_settings
from tests.conftest import data_url, decode_picture, same
from tests.web import Fault, Web, serve
from tools.server import cog_server, predict, wait_until_idle

CONTENT = bytes(range(256)) * 100


def settings(**variables: str) -> Settings:
    return read_settings({"LORA_ALLOW_PRIVATE_HOSTS": "1", **variables})


@pytest.fixture
def web() -> Iterator[Web]:
    with serve(Web(files={"/x.png": CONTENT})) as running:
        yield running


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "file:///etc/passwd", Path("/etc/passwd"), "../x.png", "ftp://example.com/x.png", "x"]
)
def test_paths_on_the_server_are_not_read(path: str | Path) -> None:
    with pytest.raises(InputError, match=r"^image must be an http\(s\) address or a data: URI; paths on the server"):
        fetch_picture(path, "image", settings())


def test_a_file_where_cog_puts_what_it_fetches_is_not_read_either() -> None:
    with tempfile.NamedTemporaryFile() as file, pytest.raises(InputError, match="paths on the server are not read"):
        fetch_picture(Path(file.name), "mask", settings())


@pytest.mark.parametrize("nothing", [None, "", "  "])
def test_empty_text_is_no_picture(nothing: str | None) -> None:
    assert fetch_picture(nothing, "image", settings()) is None


ENCODED = base64.b64encode(CONTENT).decode()


@pytest.mark.parametrize(
    "uri",
    [
        f"data:image/png;base64,{ENCODED}",
        f"data:;base64,{ENCODED}",
        f"DATA:image/png;name=a;BASE64,{ENCODED}",
        f"data:image/png;base64,{ENCODED[:100]}\n{ENCODED[100:]}",
        f"data:image/png;base64,{ENCODED.replace('/', '%2F')}",
        f"data:,{''.join(f'%{byte:02x}' for byte in CONTENT)}",
    ],
    ids=["plain", "no type", "capitals", "a line break", "percent and base64", "percent"],
)
def test_what_is_in_a_data_uri(uri: str) -> None:
    assert fetch_picture(uri, "image", settings()) == CONTENT


@pytest.mark.parametrize("uri", ["data:", "data:image/png;base64", "data:image/png;base64,AAA"])
def test_a_data_uri_that_is_not_whole(uri: str) -> None:
    with pytest.raises(InputError, match=r"^image is not a whole data: URI: send data:image/png;base64,<data>\.$"):
        fetch_picture(uri, "image", settings())


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "2130706433", "[::ffff:127.0.0.1]", "169.254.169.254", "metadata.google.internal"],
)
def test_private_hosts_are_refused_in_the_same_words_whatever_is_there(web: Web, host: str) -> None:
    open_port = web.url.rpartition(":")[2]
    for port in (open_port, "9"):
        for scheme in ("http", "https"):
            with pytest.raises(InputError) as caught:
                fetch_picture(f"{scheme}://{host}:{port}/x.png", "image", read_settings({}))
            assert str(caught.value) == (
                f"{host.strip('[]')} is on a private network, which is refused: use a public address, or set "
                "LORA_ALLOW_PRIVATE_HOSTS=1."
            )
    assert not web.asked


def test_a_redirect_to_a_private_host_is_refused(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server stands in for a public one by being the proxy that leads there."""
    monkeypatch.setenv("http_proxy", web.url)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    web.redirects["/y.png"] = "http://169.254.169.254/x.png"
    assert fetch_picture("http://pictures.test/x.png", "image", read_settings({})) == CONTENT
    with pytest.raises(InputError, match=r"^169\.254\.169\.254 is on a private network"):
        fetch_picture("http://pictures.test/y.png", "image", read_settings({}))
    assert len(web.asked) == 2


def test_an_address_is_refused_where_the_operator_wants_none(web: Web) -> None:
    only_data = settings(INPUTS_AS_DATA_ONLY="1")
    with pytest.raises(InputError, match=r"^image is an address, and this server takes pictures only as data: URIs\.$"):
        fetch_picture(f"{web.url}/x.png", "image", only_data)
    assert not web.asked
    assert fetch_picture(f"data:;base64,{ENCODED}", "image", only_data) == CONTENT


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        (Fault(9, drip=0.05), r"image did not arrive within 0\.5 seconds\."),
        (Fault(9, cut_after=50), r"image broke off on its way from 127\.0\.0\.1 \(the connection broke\)\."),
        (Fault(9, status=503), r"image: 127\.0\.0\.1 answers 503, try again later\."),
        (Fault(9, status=404), r"image does not exist \(127\.0\.0\.1 answers 404\)\."),
        (Fault(9, endless=True), r"image has more than 1 MB: send a smaller file\."),
        (Fault(9, headers={"Content-Type": "text/html"}), r"image: 127\.0\.0\.1 sent a web page instead of a file\."),
    ],
    ids=["drips", "broken off", "503", "404", "endless", "a page"],
)
def test_a_picture_that_does_not_come_is_one_sentence(
    web: Web, monkeypatch: pytest.MonkeyPatch, fault: Fault, sentence: str
) -> None:
    monkeypatch.setattr(pictures, "MOST_BYTES", 10**6)
    web.fault = fault
    with pytest.raises(InputError, match=f"^{sentence}$"):
        fetch_picture(f"{web.url}/x.png", "image", settings(INPUT_TIMEOUT="0.5" if fault.drip else "60"))


def test_a_connection_that_breaks_once_is_tried_again(web: Web) -> None:
    web.fault = Fault(1, cut_after=50)
    assert fetch_picture(f"{web.url}/x.png", "image", settings()) == CONTENT


def test_a_server_fetches_pictures_and_a_cancel_reaches_it_there(
    environment: dict[str, str], small: dict[str, Any], photo: Image.Image
) -> None:
    """Also in the milliseconds in which Cog would start threads for them."""
    file = io.BytesIO()
    photo.save(file, "PNG")
    arrives = threading.Event()
    with (
        serve(Web(files={"/x.png": file.getvalue(), "/slow.png": CONTENT})) as web,
        cog_server(environment | {"LORA_ALLOW_PRIVATE_HOSTS": "1"}) as cog,
        ThreadPoolExecutor(1) as pool,
    ):

        def start(name: str, image: str) -> Any:
            wait_until_idle(cog.url)
            body = {"input": {**small, "image": image}}
            return pool.submit(requests.put, f"{cog.url}/predictions/{name}", json=body, timeout=None)

        def cancel(name: str) -> None:
            requests.post(f"{cog.url}/predictions/{name}/cancel", timeout=None)

        by_address, by_data = (
            predict(cog.url, {**small, "image": image})["output"] for image in (f"{web.url}/x.png", data_url(photo))
        )
        assert same(*(decode_picture(output[0]) for output in (by_address, by_data)))
        web.fault = Fault(only="slow.png", wait=arrives)
        slow = start("slow", f"{web.url}/slow.png")
        while not any(request.path == "/slow.png" for request in web.asked):
            arrives.wait(0.01)
        cancel("slow")
        assert slow.result().json()["status"] == "canceled"
        arrives.set()
        for i in range(10):
            quick = start(f"quick-{i}", data_url(photo))
            arrives.wait(0.002 * i)
            cancel(f"quick-{i}")
            assert quick.result().status_code in (200, 409)
        assert predict(cog.url, {**small, "image": f"{web.url}/x.png"})["output"] == by_address
