"""An operator may close the door for addresses of inputs: then Cog reaches no network with them."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from guards import REFUSAL
from tests.conftest import data_url
from tests.web import Web, lora_file, serve
from tools import ROOT
from tools.server import cog_server


def test_inputs_are_taken_only_as_data_where_the_operator_says_so(
    environment: dict[str, str], small: dict[str, Any], photo: Image.Image
) -> None:
    with serve(Web()) as web, cog_server(environment | {"INPUTS_AS_DATA_ONLY": "1", "NO_PROXY": "*"}) as cog:
        for address in (f"{web.url}/x.png", web.url.replace("http:", "https:"), "http://169.254.169.254/x"):
            answer = cog.predict({**small, "image": address})
            assert answer["status"] == "failed"
            assert REFUSAL in answer["error"]
        assert not web.asked
        assert cog.predict({**small, "image": data_url(photo)})["status"] == "succeeded"


@pytest.mark.parametrize("proxied", [False, True])
def test_loras_are_fetched_as_before(tmp_path: Path, proxied: bool) -> None:
    with serve(Web()) as web:
        path = "/x.safetensors"
        web.files[path] = web.files[f"http://lora.test{path}"] = lora_file()
        code = (
            "import os, sys; from guards import refuse_addresses; from fetch.sources import fetch_lora;"
            "from settings import read_settings; refuse_addresses();"
            "print(fetch_lora(sys.argv[1], read_settings()).origin)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, f"http://lora.test{path}" if proxied else f"{web.url}{path}"],
            env={"LORA_CACHE_DIR": str(tmp_path), "LORA_ALLOW_PRIVATE_HOSTS": "1", "HOME": str(tmp_path)}
            | ({"http_proxy": web.url} if proxied else {}),
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.stdout.strip() == "download", done.stderr
