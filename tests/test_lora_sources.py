"""From what a person pastes to a whole file on disk: every form, every hub, every fault, and nothing half done."""

import base64
import ctypes
import hashlib
import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from fetch import references
from fetch.civitai import CivitaiModel
from fetch.fetched import FetchedLora
from fetch.files import choose_file
from fetch.hub import Source
from fetch.hugging_face import HuggingFaceRepo
from fetch.limits import FetchLimits
from fetch.network import plain_reason
from fetch.references import parse_reference
from fetch.replicate import ReplicateModel
from fetch.sources import clear_leftovers, fetch_lora, fetch_weights
from fetch.web import DataUri, FolderFile, WebFile
from lora.about import describe
from lora.errors import LoraError
from lora.header import read_header
from settings import Settings, read_settings
from tests.shelf import shelf_hub
from tests.web import COMMIT, Fault, Web, lora_file, serve, tar_file, trained
from tools.cog_schema import ROOT

FAST = FetchLimits(  # but for the timeouts, which no loaded machine is to reach
    connect_timeout=20, read_timeout=20, total_timeout=60, retry_pauses=(0.01, 0.01), longest_retry_pause=1.5,
    segment_bytes=8192, connections=4, progress_interval=0.05,
)  # fmt: skip
SHORT_OF_TIME = {"drip": replace(FAST, total_timeout=0.5), "silence": replace(FAST, read_timeout=0.2)}
VERSION = "ab" * 32
LORA = lora_file()


@pytest.fixture
def web() -> Iterator[Web]:
    with serve(Web()) as web:
        yield web


@pytest.fixture
def fetch(web: Web, tmp_path: Path) -> Callable[..., FetchedLora]:
    def fetch(reference: str, limits: FetchLimits = FAST, **environment: str) -> FetchedLora:
        fetched = fetch_lora(reference, settings(web, tmp_path, **environment), limits)
        check_cache(tmp_path)
        return fetched

    return fetch


def variables(web: Web, cache: Path, **environment: str) -> dict[str, str]:
    endpoints = {f"{hub}_ENDPOINT": web.url for hub in ("HF", "CIVITAI", "REPLICATE")}
    return endpoints | {"LORA_CACHE_DIR": str(cache), "LORA_ALLOW_PRIVATE_HOSTS": "1"} | environment


def settings(web: Web, cache: Path, **environment: str) -> Settings:
    return read_settings(variables(web, cache, **environment))


def check_cache(cache: Path, secret: str = "secret") -> None:
    """Only whole files, each what its name says, nothing half done, nobody's lock, no secret."""
    for file in cache.glob("files/*"):
        assert hashlib.sha256(file.read_bytes()).hexdigest() == file.stem
    assert not list(cache.glob("parts/*"))
    for file in cache.glob("locks/*"):
        lock = FileLock(file)
        lock.acquire(timeout=20)
        lock.release()
    for file in cache.rglob("*"):
        assert secret not in str(file)
        assert not (file.suffix == ".json" and secret in file.read_text())


# References


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("fofr/flux-pixar-cars", ReplicateModel("fofr", "flux-pixar-cars")),
        ("  Fofr/Flux-Pixar-Cars/ ", ReplicateModel("fofr", "flux-pixar-cars")),
        (f"fofr/flux-pixar-cars/{VERSION}", ReplicateModel("fofr", "flux-pixar-cars", VERSION)),
        (f"fofr/flux-pixar-cars:{VERSION}", ReplicateModel("fofr", "flux-pixar-cars", VERSION)),
        ("https://replicate.com/fofr/flux-pixar-cars?x=1#a", ReplicateModel("fofr", "flux-pixar-cars")),
        (f"replicate.com/fofr/x/versions/{VERSION}/", ReplicateModel("fofr", "x", VERSION)),
        ("https://replicate.com/fofr/x/_weights", ReplicateModel("fofr", "x")),
        ("huggingface.co/XLabs-AI/flux-lora", HuggingFaceRepo("XLabs-AI/flux-lora")),
        ("HTTPS://WWW.HuggingFace.CO/XLabs-AI/flux-lora/", HuggingFaceRepo("XLabs-AI/flux-lora")),
        ("hf.co/a/b/tree/v2", HuggingFaceRepo("a/b", "v2")),
        ("huggingface.co/a/b/c d.safetensors", None),
        ("huggingface.co/a/b/c%20d.safetensors", HuggingFaceRepo("a/b", None, "c d.safetensors")),
        ("http://huggingface.co/a/b/x/y.safetensors", HuggingFaceRepo("a/b", None, "x/y.safetensors")),
        (
            "https://huggingface.co/a/b/resolve/refs%2Fpr%2F1/x/y.safetensors?download=true",
            HuggingFaceRepo("a/b", "refs/pr/1", "x/y.safetensors"),
        ),
        (f"https://huggingface.co/a/b/blob/{COMMIT}/y.safetensors", HuggingFaceRepo("a/b", COMMIT, "y.safetensors")),
        ("https://huggingface.co/a/b/tree/main/x/y", HuggingFaceRepo("a/b", "main", None, None, "x/y")),
        ("huggingface.co/a/b?subfolder=x", HuggingFaceRepo("a/b", None, None, None, "x")),
        ("[a lora](https://huggingface.co/a/b)", HuggingFaceRepo("a/b")),
        (' "huggingface.co/a/b", ', HuggingFaceRepo("a/b")),
        ("\u200b<https://huggingface.co/a/b>\ufeff", HuggingFaceRepo("a/b")),
        ("“fofr/x”", ReplicateModel("fofr", "x")),
        (f"https://replicate.com/fofr/x:{VERSION}", ReplicateModel("fofr", "x", VERSION)),
        (f"r8.im/fofr/x@sha256:{VERSION}", ReplicateModel("fofr", "x", VERSION)),
        ("civitai.com/models/123", CivitaiModel(123)),
        ("https://www.civitai.com/models/123/some-name/?modelVersionId=456#top", CivitaiModel(123, 456)),
        (
            "https://civitai.com/api/download/models/456?type=Model&token=s3",
            CivitaiModel(None, 456, "s3", (("type", "model"),)),
        ),
        (
            "civitai.com/api/download/models/456?size=pruned&fp=fp16",
            CivitaiModel(None, 456, None, (("size", "pruned"), ("fp", "fp16"))),
        ),
        ("urn:air:flux1:lora:civitai:709988@1601041", CivitaiModel(709988, 1601041)),
        ("air:flux1:lora:civitai:709988", CivitaiModel(709988)),
        ("civitai.red/models/5", CivitaiModel(5)),
        (f"fofr/x/versions/{VERSION}", ReplicateModel("fofr", "x", VERSION)),
        ("https://replicate.com/fofr/x/api", ReplicateModel("fofr", "x")),
        ("replicate.com/fofr/x/train", ReplicateModel("fofr", "x")),
        (
            "huggingface.co/a/b?weight_name=c%20d.safetensors&token=hf_s",
            HuggingFaceRepo("a/b", None, "c d.safetensors", "hf_s"),
        ),
        (
            "huggingface.co/a/b/tree/v2?weight_name=x.safetensors&subfolder=y",
            HuggingFaceRepo("a/b", "v2", "y/x.safetensors"),
        ),
        ("https://replicate.delivery/xezq/abc/trained_model.tar", WebFile("https://replicate.delivery/xezq/abc/trained_model.tar")),
        ("HTTP://Example.com/A.safetensors?sig=1#x", WebFile("http://example.com/A.safetensors?sig=1")),
        ("my lora.safetensors", FolderFile("my lora.safetensors")),
        ("example.com/a.safetensors", WebFile("https://example.com/a.safetensors")),
        ("data:application/octet-stream;base64,AAAA", DataUri("AAAA")),
    ],
)  # fmt: skip
def test_every_form_has_its_source(text: str, source: Source | None) -> None:
    if source is None:
        with pytest.raises(LoraError):
            parse_reference(text)
    else:
        assert parse_reference(text) == source


@pytest.mark.parametrize(
    "text",
    [
        "",
        "flux",
        "a/b/c/d",
        "./x.safetensors",
        "weights/x.safetensors",
        "../x.safetensors",
        "huggingface.co/a/b?weight_name=../x.safetensors",
        "huggingface.co/a/b?weight_name=x.bin",
        "urn:air:flux1:lora:civitai:x",
        "replicate.com/a/b/c/d",
        "../../etc/passwd",
        "/etc/passwd",
        "file:///etc/x.safetensors",
        "ftp://example.com/x.safetensors",
        "https://example.com/x.ckpt",
        "https://example.com/x.tar",
        "https://u:hush@example.com/x.safetensors",
        "https://example.com:99999/x.safetensors",
        "https://[::1/x.safetensors",
        "huggingface.co/a",
        "huggingface.co/datasets/a/b.safetensors",
        "huggingface.co/a/b/resolve/main/../x.safetensors",
        "civitai.com/models/abc",
        "civitai.com/models/1?modelVersionId=x&token=hush",
        "C:\\loras\\x.safetensors",
        "a/b\n.safetensors",
        "x" * 10_000,
    ],
)
def test_anything_else_shows_the_accepted_forms(text: str) -> None:
    with pytest.raises(LoraError, match=r"does not name a LoRA: use a Replicate model <owner>/<name>") as caught:
        parse_reference(text)
    assert "hush" not in str(caught.value)
    assert len(str(caught.value)) < 500


@given(st.text() | st.from_regex(r"(https?://|data:)?(www\.)?[a-z.]*(/[\w.%@:?#-]*)*"))
def test_any_text_is_a_source_or_one_sentence(text: str) -> None:
    source = sentence = None
    try:
        source = parse_reference(text)
    except LoraError as error:
        sentence = str(error)
    if source is None:
        assert re.fullmatch(r".+\.", sentence or "")
    else:
        assert source.label
        assert parse_reference(f" {text} ") == source


# Hubs


def hubs(web: Web) -> dict[str, str]:
    """A reference of every kind; all of them lead to the same file."""
    web.replicate("fofr/cars", trained(LORA), VERSION)
    web.hugging_face("acme/lora", {"README.md": b"hello", "x.safetensors": LORA})
    web.civitai(7, {70: ("SDXL 1.0", lora_file(1)), 71: ("Flux.1 D", LORA), 72: ("Pony", lora_file(2))})
    web.files["/x.safetensors"] = LORA
    web.files["/x.tar.safetensors"] = trained(LORA)
    return {
        "replicate": "fofr/cars",
        "replicate version": f"fofr/cars/{VERSION}",
        "hugging face": "huggingface.co/acme/lora",
        "hugging face commit": f"https://huggingface.co/acme/lora/resolve/{COMMIT}/x.safetensors",
        "civitai": "https://civitai.com/models/7/name",
        "civitai version": "civitai.com/models/7?modelVersionId=71",
        "civitai version as page": "civitai.com/models/71",
        "url": f"{web.url}/x.safetensors?sig=secret",
        "url of a tar": f"{web.url}/x.tar.safetensors",
        "data": f"data:;base64,{base64.b64encode(LORA).decode()}",
        "data tar": f"data:application/x-tar;base64,{base64.b64encode(trained(LORA)).decode()}",
    }


NAMES = list(hubs(Web()))
IMMUTABLE = [name for name in NAMES if "version" in name or "commit" in name or "data" in name]


@pytest.mark.parametrize("name", NAMES)
def test_a_reference_is_fetched_once(web: Web, fetch: Callable[..., FetchedLora], name: str) -> None:
    reference = hubs(web)[name]
    first = fetch(reference)
    assert first.path.read_bytes() == LORA
    assert first.origin == "download"
    fetched = len(web.downloads())
    second = fetch(reference)
    assert (second.path, second.origin) == (first.path, "disk")
    assert len(web.downloads()) == fetched or name.startswith("url")  # an address is asked whether it has changed


@pytest.mark.parametrize("name", NAMES)
def test_the_cache_serves_when_the_hub_is_down(
    web: Web, fetch: Callable[..., FetchedLora], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    reference = hubs(web)[name]
    first = fetch(reference)
    web.failing = 503
    web.asked.clear()
    with caplog.at_level(logging.WARNING, "flux-lora"):
        assert fetch(reference).path == first.path
    if name in IMMUTABLE and name != "civitai version as page":
        assert not web.asked
    else:
        assert "The copy in the LoRA cache is used." in caplog.text
        assert "secret" not in caplog.text


def test_the_newest_version_is_asked_for(web: Web, fetch: Callable[..., FetchedLora]) -> None:
    references = hubs(web)
    for name in ("replicate", "hugging face", "civitai", "url"):
        fetch(references[name])
    newer = lora_file(9)
    web.replicate("fofr/cars", trained(newer))
    web.hugging_face("acme/lora", {"x.safetensors": newer}, commit="ab" * 20)
    web.civitai(7, {71: ("Flux.1 D", LORA), 73: ("Flux.1 S", newer)})
    web.files["/x.safetensors"] = newer
    for name in ("replicate", "hugging face", "civitai", "url"):
        assert fetch(references[name]).path.read_bytes() == newer, name


def test_an_unchanged_file_is_not_sent_again(web: Web, fetch: Callable[..., FetchedLora]) -> None:
    web.files["/x.safetensors"] = LORA
    for expected in ("download", "disk", "disk"):
        assert fetch(f"{web.url}/x.safetensors").origin == expected
    web.validators = False
    assert fetch(f"{web.url}/x.safetensors").origin == "download"


def test_tokens_open_what_is_private_and_stay_with_their_hub(
    web: Web, fetch: Callable[..., FetchedLora], caplog: pytest.LogCaptureFixture
) -> None:
    references = hubs(web)
    tokens = {"HF_TOKEN": "hf_secret", "CIVITAI_API_TOKEN": "c_secret", "REPLICATE_API_TOKEN": "r_secret"}
    web.tokens = {"/acme/": "hf_secret", "/api/models": "hf_secret", "/api/": "c_secret", "/fofr/": "r_secret"}
    with serve(Web(files=web.files)) as elsewhere, caplog.at_level(logging.INFO):
        web.redirects |= {
            f"/acme/lora/resolve/{COMMIT}/x.safetensors": f"{elsewhere.url}/x.safetensors",
            "/api/download/models/71": f"{elsewhere.url}/x.safetensors",
            "/fofr/cars/_weights": f"{elsewhere.url}/x.safetensors",
        }
        for name, variable in (
            ("hugging face", "HF_TOKEN"),
            ("civitai", "CIVITAI_API_TOKEN"),
            ("replicate", "REPLICATE_API_TOKEN"),
        ):
            with pytest.raises(LoraError, match=variable) as caught:
                fetch(references[name], **{variable: "wrong-secret"})
            assert "secret" not in str(caught.value)
            assert fetch(references[name], **tokens).path.read_bytes() == LORA
        assert elsewhere.asked
        assert not any("Authorization" in request.headers for request in elsewhere.asked)
    assert "secret" not in caplog.text


def test_a_token_in_a_pasted_address_opens_for_that_address_alone(
    web: Web, fetch: Callable[..., FetchedLora], caplog: pytest.LogCaptureFixture
) -> None:
    hubs(web)
    web.tokens = {"/api/": "my-secret"}
    with caplog.at_level(logging.INFO):
        assert fetch("https://civitai.com/api/download/models/71?token=my-secret").origin == "download"
    with pytest.raises(LoraError, match="CIVITAI_API_TOKEN"):
        fetch("https://civitai.com/api/download/models/71")
    assert "secret" not in caplog.text
    assert all("secret" not in request.path for request in web.asked)


WEIGHTS = b"\x02\0\0\0\0\0\0\0{}"


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({"a.safetensors": b"a", "lora.safetensors": LORA}, True),
        ({"checkpoint-1/lora.safetensors": b"a", "lora.safetensors": LORA}, True),
        ({"model_index.json": b"", "pytorch_lora_weights.safetensors": LORA}, True),
        ({"a.safetensors": b"a", "b.safetensors": b"b"}, r"holds a.safetensors, b.safetensors; name one, as in hugg"),
        ({"a.bin": b"a"}, r"holds no \.safetensors file"),
        ({"model_index.json": b"", "a.safetensors": LORA}, "is a whole model"),
        ({"a.safetensors.index.json": b"", "a-1.safetensors": b"", "a-2.safetensors": b""}, "is a whole model"),
        ({"a.safetensors": lora_file(name="base")}, "is a whole model or a part of one, not a LoRA"),
        ({"a.safetensors": lora_file(columns=100_000)}, r"has 0\.0016 GB; LORA_MAX_GB allows 0\.001 GB"),
        ({"a.safetensors": WEIGHTS}, "without a single tensor"),
    ],
)
def test_a_repo_gives_its_lora_or_says_what_it_holds(
    web: Web, fetch: Callable[..., FetchedLora], files: dict[str, bytes], found: bool | str
) -> None:
    web.hugging_face("acme/lora", files)
    if isinstance(found, bool):
        assert fetch("huggingface.co/acme/lora").path.read_bytes() == LORA
    else:
        with pytest.raises(LoraError, match=found):
            fetch("huggingface.co/acme/lora", LORA_MAX_GB="0.001")


PEFT_CONFIG = b'{"peft_type": "LORA", "r": 4, "lora_alpha": 8}'


def test_pefts_configuration_comes_along(web: Web, fetch: Callable[..., FetchedLora]) -> None:
    """In the file's own metadata; the tensors are as they were."""
    other = b'{"peft_type": "LORA", "r": 4, "lora_alpha": 999}'
    adapter = {"x/adapter_model.safetensors": LORA, "x/adapter_config.json": PEFT_CONFIG, "adapter_config.json": other}
    web.hugging_face("acme/peft", adapter)
    web.replicate("acme/peft", tar_file({f"out/{name}": body for name, body in adapter.items()}))
    for reference in ("huggingface.co/acme/peft", "acme/peft"):
        fetched = fetch(reference)
        with safe_open(fetched.path, framework="np") as file:
            assert file.metadata()["adapter_config.json"] == PEFT_CONFIG.decode()
        assert safetensors_bytes(fetched.path.read_bytes()) == safetensors_bytes(LORA)
        asked = len(web.asked)
        assert fetch(reference).path == fetched.path
        assert not any(request.path.endswith(("config.json", ".safetensors", ".tar")) for request in web.asked[asked:])


def safetensors_bytes(file: bytes) -> bytes:
    """What comes after the header."""
    return file[8 + int.from_bytes(file[:8], "little") :]


def test_a_repo_whose_configuration_does_not_arrive_is_not_half_fetched(
    web: Web, fetch: Callable[..., FetchedLora]
) -> None:
    web.hugging_face("acme/peft", {"adapter_model.safetensors": LORA, "adapter_config.json": b"x" * (1 << 20) + b"x"})
    with pytest.raises(LoraError, match="allows"):
        fetch("huggingface.co/acme/peft")
    del web.files[f"/acme/peft/resolve/{COMMIT}/adapter_config.json"]
    with pytest.raises(LoraError, match="does not exist"):
        fetch("huggingface.co/acme/peft")


def test_hugging_face_says_why(web: Web, fetch: Callable[..., FetchedLora]) -> None:
    references = hubs(web)
    with pytest.raises(LoraError, match="no such repo, or it is private and HF_TOKEN is needed"):
        fetch("huggingface.co/acme/nothing")
    with pytest.raises(LoraError, match=r"y\.safetensors does not exist: the repo holds x\.safetensors"):
        fetch("huggingface.co/acme/lora/y.safetensors")
    file = f"/acme/lora/resolve/{COMMIT}/x.safetensors"
    web.tokens, web.gated = {file: "hf_secret"}, {file}
    with pytest.raises(LoraError, match="is gated: accept its licence on its page and set HF_TOKEN"):
        fetch(references["hugging face"])


@pytest.mark.parametrize(
    "answer", [[], {"sha": "../x", "siblings": []}, {"siblings": [{"rfilename": 5}]}, {"siblings": 5}]
)
def test_an_odd_answer_of_hugging_face_is_one_sentence(
    web: Web, fetch: Callable[..., FetchedLora], answer: Any
) -> None:
    web.pages["/api/models/acme/odd"] = answer
    with pytest.raises(LoraError, match=r"^huggingface.co/acme/odd: Hugging Face's answer is not understood\.$"):
        fetch("huggingface.co/acme/odd")


def test_civitai_says_why(web: Web, fetch: Callable[..., FetchedLora]) -> None:
    hubs(web)
    web.civitai(8, {80: ("SDXL 1.0", LORA), 81: ("Pony", LORA)})
    web.civitai(9, {90: ("Flux.1 D", LORA)}, kind="Checkpoint")
    for reference, sentence in {
        "civitai.com/models/8": "civitai.com/models/8 is for SDXL 1.0, Pony, not for FLUX.1.",
        "civitai.com/models/7?modelVersionId=72": "civitai.com/models/7 version 72 is for Pony, not for FLUX.1.",
        "civitai.com/models/9": "civitai.com/models/9 is no LoRA: CivitAI lists it as Checkpoint.",
    }.items():
        with pytest.raises(LoraError) as caught:
            fetch(reference)
        assert str(caught.value) == sentence
    with pytest.raises(LoraError, match=r"civitai.com/models/5 does not exist .* set CIVITAI_API_TOKEN"):
        fetch("civitai.com/models/5")


def test_civitai_versions_that_cannot_be_had_are_named(web: Web, fetch: Callable[..., FetchedLora]) -> None:
    web.civitai(7, {70: ("Flux.1 D", LORA), 71: ("Flux.1 D", lora_file(1)), 72: ("Other", lora_file(2))})
    page = web.pages["/api/v1/models/7"]["modelVersions"][1]
    page |= {"availability": "EarlyAccess", "earlyAccessEndsAt": "2999-01-02T00:00:00.000Z"}
    free = ": the newest version that is free is civitai.com/models/7?modelVersionId=70."
    early = f"civitai.green/models/7 version 71 is in early access, for those who bought it, until 2999-01-02{free}"
    for reference in ("civitai.green/models/7", "civitai.green/models/7?modelVersionId=71"):
        with pytest.raises(LoraError) as caught:
            fetch(reference)
        assert str(caught.value) == early
    assert fetch(early.rstrip(".").rpartition(" ")[2]).read(content) == LORA
    assert fetch("civitai.com/models/7", CIVITAI_API_TOKEN="bought").read(content) == lora_file(1)
    page["earlyAccessEndsAt"] = "2020-01-02T00:00:00.000Z"
    page["usageControl"] = "InternalGeneration"
    with pytest.raises(LoraError, match=r"version 71 cannot be downloaded: its author allows it for .* generator only"):
        fetch("civitai.com/models/7")
    assert fetch("civitai.com/models/7?modelVersionId=72").read(content) == lora_file(2)  # whatever its label
    web.pages["/api/v1/models/8"] = {"id": 8, "type": "LORA", "modelVersions": []}
    with pytest.raises(LoraError, match=r"civitai\.com/models/8 has no version that is published"):
        fetch("civitai.com/models/8")


def test_an_address_chooses_among_the_files_of_a_version(web: Web, fetch: Callable[..., FetchedLora]) -> None:
    web.civitai(7, {70: ("Flux.1 D", LORA)})
    files, second = web.pages["/api/v1/model-versions/70"]["files"], lora_file(1)
    files[1] |= {"id": 5, "metadata": {"format": "SafeTensor", "size": "full", "fp": "fp32"}}
    files.append(
        {
            **files[1], "id": 6, "primary": False, "name": "small.safetensors",
            "metadata": {"format": "SafeTensor", "size": "pruned", "fp": "fp16"},
            "hashes": {"SHA256": hashlib.sha256(second).hexdigest()},
        }
    )  # fmt: skip
    address = "https://civitai.com/api/download/models/70?type=Model&format=SafeTensor"
    assert fetch(f"{address}&size=full&fp=fp32").read(content) == LORA
    web.files["/api/download/models/70"] = second
    for query, asked in (("&size=pruned&fp=fp16", "type=Model"), ("&fileId=6", "fileId=6")):
        assert fetch(address + query).read(content) == second
        assert web.downloads()[-1].query == asked
    with pytest.raises(LoraError, match=r"with .*fileid=7; there are lora.safetensors \(format=.* fileId=5\), small"):
        fetch(f"{address}&fileId=7")
    with pytest.raises(LoraError, match=r"no \.safetensors file with .*fp=bf16; there are lora.safetensors \(format="):
        fetch(f"{address}&fp=bf16")


def test_a_suggested_address_works(web: Web, fetch: Callable[..., FetchedLora]) -> None:
    web.hugging_face("acme/lora", {"my 1st #lora 100%.safetensors": LORA, "other.safetensors": LORA})
    for reference in ("huggingface.co/acme/lora", f"huggingface.co/acme/lora/tree/{COMMIT}"):
        with pytest.raises(LoraError) as caught:
            fetch(reference)
        assert fetch(str(caught.value).rpartition(" ")[2].rstrip(".")).read(content) == LORA
    assert fetch("huggingface.co/acme/lora?weight_name=other.safetensors").read(content) == LORA
    inner = {f"{folder}/{name}.safetensors": lora_file(i) for i, (folder, name) in enumerate(("ax", "bx", "by"))}
    web.hugging_face("acme/folders", inner)
    assert fetch("huggingface.co/acme/folders/tree/main/a").read(content) == lora_file(0)
    with pytest.raises(
        LoraError, match=r"folders/b holds b/x.safetensors, b/y.safetensors; name one, as in "
    ) as caught:
        fetch("huggingface.co/acme/folders?subfolder=b")
    assert fetch(str(caught.value).rpartition(" ")[2].rstrip(".")).read(content) == lora_file(1)
    with pytest.raises(LoraError, match=r"it looks like a Hugging Face repo: huggingface\.co/Acme/Lora"):
        fetch("Acme/Lora")
    with pytest.raises(LoraError, match=r"if it is a Hugging Face repo: huggingface\.co/acme/lora"):
        fetch("acme/lora")
    with pytest.raises(LoraError, match=r"replicate\.com/p/abc is a prediction, not a model"):
        fetch("https://replicate.com/p/abc")


def test_a_token_in_a_hugging_face_address_counts(web: Web, fetch: Callable[..., FetchedLora]) -> None:
    web.hugging_face("acme/lora", {"x.safetensors": LORA})
    web.tokens = {"/acme/": "my-secret", "/api/": "my-secret"}
    assert fetch("huggingface.co/acme/lora?token=my-secret").read(content) == LORA
    with pytest.raises(LoraError, match="HF_TOKEN is needed"):
        fetch("huggingface.co/acme/lora")


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"PK\x03\x04" + bytes(100), "a zip archive"),
        (b"\x1f\x8b\x08" + bytes(100), "a gzip archive"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "a Git LFS pointer"),
        (b"\n<!DOCTYPE html><title>Sign in</title>", "a web page"),
        (b'{"error": "not found"}', "JSON"),
    ],
)
def test_what_is_no_safetensors_file_is_named(
    web: Web, fetch: Callable[..., FetchedLora], body: bytes, kind: str
) -> None:
    web.files["/x.safetensors"] = body
    with pytest.raises(LoraError, match=f"/x.safetensors is not a whole safetensors file: it is {kind}.*; .+"):
        fetch(f"{web.url}/x.safetensors")


@pytest.mark.parametrize("how", ["stalls", "breaks", "drips", "breaks its chunks"])
def test_a_hub_that_does_not_finish_its_answer_leads_to_the_cached_copy(
    web: Web, fetch: Callable[..., FetchedLora], how: str, caplog: pytest.LogCaptureFixture
) -> None:
    reference = hubs(web)["civitai"]
    limits = replace(FAST, read_timeout=0.2) if how == "stalls" else FAST
    if how == "drips":
        limits = replace(FAST, total_timeout=1.0)
    fetch(reference)
    web.broken_pages = how
    with caplog.at_level(logging.WARNING, "flux-lora"):
        assert fetch(reference, limits).origin == "disk"
    assert "The copy in the LoRA cache is used." in caplog.text
    with pytest.raises(LoraError, match=r"^civitai.com/models/8[^\n]*\.$"):
        fetch("civitai.com/models/8", limits)
    web.broken_pages = None
    web.civitai(8, {80: ("Flux.1 D", lora_file(3))})
    web.broken_pages, web.broken_times = how, 1
    if how != "drips":
        assert fetch("civitai.com/models/8", limits).origin == "download"  # the second try


@pytest.mark.parametrize("how", ["stalls", "breaks", "breaks its chunks"])
def test_hugging_face_that_breaks_off_leads_to_the_cached_copy(
    web: Web, fetch: Callable[..., FetchedLora], how: str
) -> None:
    reference = hubs(web)["hugging face"]
    fetch(reference)
    web.broken_pages = how
    assert fetch(reference).origin == "disk"
    with pytest.raises(LoraError, match=r"^huggingface\.co/acme/new: Hugging Face cannot be reached\.$"):
        fetch("huggingface.co/acme/new")


def test_a_hash_that_differs_is_refused(web: Web, fetch: Callable[..., FetchedLora]) -> None:
    reference = hubs(web)["civitai"]
    web.files["/api/download/models/71"] = lora_file(5)
    with pytest.raises(LoraError, match="its SHA-256 is another"):
        fetch(reference)
    web.files["/api/download/models/71"] = LORA
    assert fetch(reference).path.read_bytes() == LORA


def test_another_hub_is_one_module(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its source and its `Hub`, in the list of hubs, are all that it takes."""

    monkeypatch.setattr(references, "HUBS", (*references.HUBS, shelf_hub(web.url)))
    web.files["/api/pixar.safetensors"] = LORA
    public_only = settings(web, tmp_path, LORA_ALLOW_PRIVATE_HOSTS="0")
    fetched = fetch_lora("https://www.shelf.test/pixar", public_only, FAST)
    assert (fetched.read(content), fetched.origin, fetched.name) == (LORA, "download", "shelf.test/pixar")
    web.failing = 503
    assert fetch_lora("shelf.test/pixar?x=1", public_only, FAST).origin == "disk"
    with pytest.raises(LoraError, match="does not name a LoRA"):
        fetch_lora("shelf.test/pixar/x.safetensors", public_only, FAST)


# Archives


def special(kind: bytes, name: str, size: int = 0) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, "/etc/passwd", size
    return info


def long_names(count: int) -> bytes:
    """Headers that each only give the next one's name."""
    header = special(tarfile.GNUTYPE_LONGNAME, "././@LongLink", 10).tobuf(tarfile.GNU_FORMAT)
    return (header + b"a" * 9 + bytes(503)) * count


@pytest.mark.parametrize(
    ("archive", "found"),
    [
        (tar_file({"../../../tmp/evil.safetensors": LORA}), True),
        (tar_file({"x.safetensors": LORA}, special(tarfile.SYMTYPE, "lora.safetensors")), True),
        (tar_file({"x.safetensors": LORA}, special(tarfile.LNKTYPE, "lora.safetensors")), True),
        (tar_file({"x.safetensors": LORA}, special(tarfile.CHRTYPE, "lora.safetensors")), True),
        (tar_file({"x.txt": LORA}), "the archive holds no .safetensors file"),
        (tar_file({"x.safetensors": LORA, "y.safetensors": LORA}), "the archive holds several .safetensors files"),
        (trained(LORA)[:3000], "is damaged"),
        (tar_file({"x.safetensors": LORA})[:30_000], "is damaged"),
        (tar_file({}, special(tarfile.REGTYPE, "x.safetensors", 10**13)), "is damaged"),
        (tar_file({}, special(tarfile.GNUTYPE_LONGNAME, "x", 10**10)), "is damaged"),
        (long_names(5000) + tar_file({"x.safetensors": LORA}), "is damaged"),
        (tar_file({}, special(tarfile.REGTYPE, "x.safetensors", -(2**70))), "is damaged"),
        (tar_file({"a\x1b\n.safetensors": LORA, "b.safetensors": LORA}), r"\('a\\x1b\\n.safetensors', b.safetensors\)"),
        (tar_file({f"{i}.txt": b"" for i in range(10_001)}), "more than 10000 files"),
        (trained(b"PK\3\4" * 100), "is not a whole safetensors file"),
    ],
)
def test_an_archive_gives_one_file_and_nothing_else(
    web: Web, fetch: Callable[..., FetchedLora], tmp_path: Path, archive: bytes, found: bool | str
) -> None:
    web.replicate("fofr/cars", archive)
    if isinstance(found, bool):
        assert fetch("fofr/cars").path.read_bytes() == LORA
    else:
        with pytest.raises(LoraError, match=found):
            fetch("fofr/cars", FetchLimits())
    check_cache(tmp_path)
    assert {file.suffix for file in tmp_path.rglob("*") if file.is_file()} <= {".lock", ".json", ".safetensors"}


def test_of_many_files_a_known_name_wins() -> None:
    assert choose_file(["b/lora.safetensors", "lora.safetensors", "x.safetensors"]) == "lora.safetensors"
    assert choose_file(["a/lora.safetensors", "b/lora.safetensors"]) is None
    assert choose_file([]) is None


# Faults

PASSING = {
    **{f"cut after {n}": Fault(cut_after=n) for n in (0, 1, 8, 4095, 8191, 8192, 20_000, len(LORA) - 1)},
    **{f"cut after {n}, no ranges": Fault(2, cut_after=n, ranges="ignored") for n in (0, 9, len(LORA) - 1)},
    "every second segment cut": Fault(3, cut_after=5000),
    "ranges ignored": Fault(99, ranges="ignored"),
    "ranges shifted": Fault(99, ranges="shifted"),
    "ranges short": Fault(99, ranges="short"),
    "ranges undeclared": Fault(99, ranges="undeclared"),
    "ranges refused": Fault(status=416),
    "absurd length": Fault(99, headers={"Content-Length": "9" * 5000}),
    "negative length": Fault(99, headers={"Content-Length": "-1"}, ranges="ignored"),
    "429": Fault(status=429, headers={"Retry-After": "1"}),
    "500": Fault(2, status=500),
}
FAILING = {
    "always cut": (Fault(99, cut_after=3), "broke off on its way from 127.0.0.1"),
    "too short": (Fault(99, headers={"Content-Length": "50000"}, ranges="ignored"), "broke off"),
    "too long": (Fault(99, headers={"Content-Length": "30000"}, ranges="ignored"), "not a whole safetensors file"),
    "401": (Fault(99, status=401), "private or needs an account"),
    "403": (Fault(99, status=403), "private or needs an account"),
    "404": (Fault(99, status=404), "does not exist"),
    "429 for an hour": (Fault(99, status=429, headers={"Retry-After": "3600"}), "asks to wait 3600 seconds"),
    "429 for ever": (Fault(99, status=429, headers={"Retry-After": "9" * 5000}), "asks to wait more than a day"),
    "500 for good": (Fault(99, status=500), "answers 500, try again later"),
    "drip": (Fault(99, drip=0.01), "did not arrive within 0.5 seconds"),
    "silence": (Fault(99, wait=threading.Event()), "no answer in time"),
    "endless": (Fault(99, endless=True, ranges="ignored"), "has more than 0.02 GB; LORA_MAX_GB allows 0.02 GB"),
    "declared too large": (
        Fault(99, headers={"Content-Length": "99999999999"}, ranges="ignored"),
        "has 100 GB; LORA_MAX_GB allows 0.02 GB",
    ),
    "html": (Fault(99, body=b"<html>", headers={"Content-Type": "text/html; charset=utf-8"}), "sent a web page"),
    "junk": (Fault(99, body=b"<html><body>" * 99), "not a whole safetensors file"),
    "cut file": (Fault(99, body=LORA[:-4]), "not a whole safetensors file"),
    "empty": (Fault(99, body=b""), "not a whole safetensors file"),
    "gzip": (Fault(99, body=b"\x1f\x8b", headers={"Content-Encoding": "gzip"}), "sent the file compressed"),
}


@pytest.mark.parametrize("name", PASSING)
def test_a_fault_that_can_be_made_good_is(web: Web, fetch: Callable[..., FetchedLora], name: str) -> None:
    web.files["/x.safetensors"], web.fault = LORA, PASSING[name]
    assert fetch(f"{web.url}/x.safetensors").path.read_bytes() == LORA


@pytest.mark.parametrize("name", FAILING)
def test_a_fault_leaves_nothing_behind(web: Web, fetch: Callable[..., FetchedLora], tmp_path: Path, name: str) -> None:
    fault, sentence = FAILING[name]
    web.files["/x.safetensors"], web.fault = LORA, fault
    with pytest.raises(LoraError, match=sentence) as caught:
        fetch(f"{web.url}/x.safetensors?sig=secret", SHORT_OF_TIME.get(name, FAST), LORA_MAX_GB="0.02")
    assert re.fullmatch(r"[^\n]+\.", str(caught.value))
    assert "secret" not in str(caught.value)
    wait_until(lambda: not list(tmp_path.glob("parts/*")))
    check_cache(tmp_path)
    assert not list(tmp_path.glob("files/*"))
    web.fault = None
    assert fetch(f"{web.url}/x.safetensors?sig=secret").path.read_bytes() == LORA


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_only_what_is_missing_is_asked_again(web: Web, fetch: Callable[..., FetchedLora]) -> None:
    web.files["/x.safetensors"], web.fault = LORA, Fault(cut_after=5000)
    fetch(f"{web.url}/x.safetensors")
    ranges = sorted(request.headers["Range"] for request in web.asked)
    assert "bytes=5000-8191" in ranges
    assert len(ranges) == len(LORA) // 8192 + 2


def test_one_connection_is_enough(web: Web, fetch: Callable[..., FetchedLora]) -> None:
    web.files["/x.safetensors"] = LORA
    assert fetch(f"{web.url}/x.safetensors", replace(FAST, connections=1)).path.read_bytes() == LORA


# Network


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "2130706433", "0x7f.1", "[::ffff:127.0.0.1]"])
def test_a_private_host_is_refused(web: Web, fetch: Callable[..., FetchedLora], host: str) -> None:
    port = web.url.rpartition(":")[2]
    with pytest.raises(LoraError, match="is on a private network, which is refused"):
        fetch(f"http://{host}:{port}/x.safetensors", LORA_ALLOW_PRIVATE_HOSTS="0")
    assert not web.asked


def test_a_redirect_into_the_private_network_is_refused(web: Web, fetch: Callable[..., FetchedLora]) -> None:
    """The hub itself is the operator's choice; where it leads to is not."""
    web.hugging_face("acme/lora", {"x.safetensors": LORA})
    assert fetch("huggingface.co/acme/lora", LORA_ALLOW_PRIVATE_HOSTS="0").path.read_bytes() == LORA
    with serve(Web(files={"/x": LORA})) as inner:
        web.redirects["/fofr/cars/_weights"] = f"{inner.url}/x"
        web.redirects["/api/models/acme/moved"] = f"{inner.url}/api/models/acme/lora"
        for reference in ("fofr/cars", "huggingface.co/acme/moved"):
            with pytest.raises(LoraError, match="is on a private network"):
                fetch(reference, LORA_ALLOW_PRIVATE_HOSTS="0")
        assert not inner.asked


def test_a_name_is_resolved_once_and_every_address_counts(
    web: Web, fetch: Callable[..., FetchedLora], monkeypatch: pytest.MonkeyPatch
) -> None:
    """DNS that answers with a public address first and a private one next gains nothing."""
    answers = [["203.0.113.1", "127.0.0.1"], ["127.0.0.1"]]

    def rebinding(host: str, port: int, *_: Any, **__: Any) -> list[Any]:
        addresses = answers.pop(0) if host == "rebind.test" else [host]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    port = web.url.rpartition(":")[2]
    for _ in range(2):
        with pytest.raises(LoraError, match=r"rebind\.test is on a private network"):
            fetch(f"http://rebind.test:{port}/x.safetensors", LORA_ALLOW_PRIVATE_HOSTS="0")
    assert not web.asked


def test_why_a_server_cannot_be_reached_is_said(web: Web, fetch: Callable[..., FetchedLora]) -> None:
    """Not every error is a broken connection, and what is no address is not tried again."""
    for address, says in (
        (web.url.replace("http:", "https:"), r"cannot be reached \(TLS with it fails\)"),
        (f"https://{'a' * 70}.example", "is not an address that can be opened"),
    ):
        with pytest.raises(LoraError, match=says):
            fetch(f"{address}/x.safetensors")
    assert plain_reason(RuntimeError("something of https://x.example/?token=secret")) == "RuntimeError"


def test_redirects_end(web: Web, fetch: Callable[..., FetchedLora]) -> None:
    web.redirects = {f"/{i}.safetensors": f"/{i + 1}.safetensors" for i in range(9)}
    web.files["/9.safetensors"] = LORA
    assert fetch(f"{web.url}/4.safetensors").path.read_bytes() == LORA
    with pytest.raises(LoraError, match="more than 5 redirects"):
        fetch(f"{web.url}/3.safetensors")
    web.redirects["/f.safetensors"] = "file:///etc/passwd"
    with pytest.raises(LoraError, match="neither http nor https"):
        fetch(f"{web.url}/f.safetensors")
    for damaged in ("http://[::1/x", "http://example.com:99999/x"):
        web.redirects["/d.safetensors"] = damaged
        with pytest.raises(LoraError, match="an address that can"):
            fetch(f"{web.url}/d.safetensors")
    for damaged in (
        *("http://user:secret@[::1/x", "http://secret?@h.test/", "http://secret#@h.test/", "http://u:secret@h.test:٣/"),
        *("http://u:secret@\x7f/", "http://u:secret@h.test\x00/", "http://[::1%secret@]/"),
    ):
        web.redirects["/d.safetensors"] = damaged
        with pytest.raises(LoraError, match=r"^[ -~]*\.$") as caught:
            fetch(f"{web.url}/d.safetensors")
        assert "secret" not in str(caught.value)


def test_proxies_of_the_environment_are_used_and_netrc_is_not(
    web: Web, fetch: Callable[..., FetchedLora], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "netrc").write_text("default login a password b\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("http_proxy", web.url)
    web.files["/x.safetensors"] = web.files["http://lora.test/x.safetensors"] = LORA
    assert fetch("http://lora.test/x.safetensors", LORA_ALLOW_PRIVATE_HOSTS="0").path.read_bytes() == LORA
    assert not any("Authorization" in request.headers for request in web.asked)
    with pytest.raises(LoraError, match="is on a private network"):
        fetch("http://169.254.169.254/x.safetensors", LORA_ALLOW_PRIVATE_HOSTS="0")


# Cache


def test_what_was_damaged_is_fetched_again(web: Web, fetch: Callable[..., FetchedLora]) -> None:
    reference = hubs(web)["civitai version"]
    path = fetch(reference).path
    for damage in (
        lambda: os.truncate(path, 1000),
        lambda: path.write_bytes(LORA[:-1] + b"?"),
        path.unlink,
        lambda: next(path.parents[1].glob("refs/*")).write_text("{"),
    ):
        damage()
        assert fetch_lora(reference, settings(web, path.parents[1]), FAST).path.read_bytes() == LORA
    os.utime(path)  # touched and still whole
    assert fetch(reference).origin == "disk"


def test_the_least_recently_used_is_evicted(web: Web, tmp_path: Path) -> None:
    for i in range(5):
        web.files[f"/{i}.safetensors"] = lora_file(i)
    (tmp_path / "holds").mkdir()
    (tmp_path / "holds" / "x.lock").touch()  # of an older version

    def get(i: int, room: float = 2.5) -> FetchedLora:
        size = str(room * len(LORA) / 1e9)
        return fetch_lora(f"{web.url}/{i}.safetensors", settings(web, tmp_path, LORA_CACHE_GB=size), FAST)

    first, second = get(0), get(1)
    assert get(0).origin == "disk"
    get(2)
    assert first.path.exists()
    assert not second.path.exists()
    assert not (tmp_path / "holds").exists()
    assert second.read(content) == lora_file(1)  # it is fetched once more
    assert get(2).origin == "disk"
    get(4, room=0.5)  # the newest stays, however large it is
    assert [path.name for path in tmp_path.glob("files/*")] == [get(4).path.name]
    check_cache(tmp_path)


def content(fetched: FetchedLora) -> bytes:
    return fetched.path.read_bytes()


def test_what_is_always_evicted_before_it_is_read_is_one_sentence(fetch: Callable[..., FetchedLora], web: Web) -> None:
    fetched = fetch(hubs(web)["replicate"])

    def read_too_late(fetched: FetchedLora) -> bytes:
        fetched.path.unlink()
        return content(fetched)

    with pytest.raises(LoraError, match=r"^fofr/cars was evicted .*: LORA_CACHE_GB is too small\.$"):
        fetched.read(read_too_late)


def test_a_cached_version_needs_a_folder_that_can_be_read_and_no_more(
    web: Web, fetch: Callable[..., FetchedLora], tmp_path: Path
) -> None:
    reference = hubs(web)["civitai version"]
    path = fetch(reference).path
    for name in ("parts", "locks"):
        shutil.rmtree(tmp_path / name)
    folders = [tmp_path / "files", tmp_path / "refs", tmp_path]

    def check() -> None:
        for folder in folders:
            folder.chmod(0o555)
        try:
            fetched = fetch(reference)
            assert (fetched.origin, fetched.read(content)) == ("disk", LORA)
        finally:
            for folder in folders:
                folder.chmod(0o755)

    check()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["files", "refs"]  # to root nothing is read-only
    os.utime(path, ns=(0, 0))  # an image layer keeps no nanoseconds
    check()


def run_fetch(web: Web, cache: Path, reference: str, **environment: str) -> "subprocess.Popen[str]":
    code = (
        "import sys; from fetch.sources import fetch_lora; from fetch.limits import FetchLimits;"
        "from settings import read_settings; from resource import *;"
        "limit = int(sys.argv[2]); limit and setrlimit(RLIMIT_FSIZE, (limit, limit));"
        "print(fetch_lora(sys.argv[1], read_settings(), FetchLimits(segment_bytes=8192)).origin)"
    )
    limit = environment.pop("LIMIT", "0")
    return subprocess.Popen(
        [sys.executable, "-c", code, reference, limit],
        cwd=ROOT, env={**os.environ, **variables(web, cache, **environment)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_processes_share_one_download(web: Web, tmp_path: Path) -> None:
    reference = hubs(web)["civitai"]
    web.fault = Fault(99, wait=threading.Event())
    with run_fetch(web, tmp_path, reference) as one, run_fetch(web, tmp_path, reference) as two:
        wait_until(lambda: len(web.downloads()) >= 4)
        time.sleep(0.5)
        assert web.fault.wait
        web.fault.wait.set()
        origins = sorted(process.communicate(timeout=60)[0].strip() for process in (one, two))
    assert origins == ["disk", "download"]
    ranges = [request.headers["Range"] for request in web.downloads()]
    assert len(ranges) == len(set(ranges))
    check_cache(tmp_path)


def test_a_killed_process_leaves_nothing_that_counts(
    web: Web, fetch: Callable[..., FetchedLora], tmp_path: Path
) -> None:
    references = hubs(web)
    web.fault = Fault(99, wait=threading.Event())
    with run_fetch(web, tmp_path, references["civitai"]) as process:
        wait_until(lambda: len(web.downloads()) >= 3)
        process.kill()
        process.communicate(timeout=10)
    assert process.returncode == -signal.SIGKILL
    assert list(tmp_path.glob("parts/*"))
    assert not list(tmp_path.glob("files/*"))
    web.fault = None
    fetch(references["url"])  # clears away what another reference left behind
    assert fetch(references["civitai"]).path.read_bytes() == LORA


def test_a_start_clears_away_what_killed_processes_left(web: Web, tmp_path: Path) -> None:
    clear_leftovers(settings(web, tmp_path / "none"))
    assert not (tmp_path / "none").exists()
    for name in ("parts/aaa.download", "parts/bbb.download", "holds/x", "locks/bbb.lock", "refs/ccc.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with FileLock(tmp_path / "locks" / "bbb.lock"):  # of a fetch that runs
        clear_leftovers(settings(web, tmp_path))
    left = [str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()]
    assert sorted(name for name in left if not name.startswith("locks")) == ["parts/bbb.download"]


def test_a_full_disk_is_one_sentence(web: Web, fetch: Callable[..., FetchedLora], tmp_path: Path) -> None:
    reference = hubs(web)["hugging face"]
    with run_fetch(web, tmp_path, reference, LIMIT="20000") as process:
        _, errors = process.communicate(timeout=60)
    assert errors.strip().splitlines()[-1].endswith("cannot be written into LORA_CACHE_DIR: File too large.")
    check_cache(tmp_path)
    assert fetch(reference).path.read_bytes() == LORA


def test_a_cache_that_cannot_be_written_serves_what_needs_no_room(
    web: Web, fetch: Callable[..., FetchedLora], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    references, other = hubs(web), lora_file(3)
    fetch(references["hugging face"])
    shutil.rmtree(tmp_path / "parts")
    (tmp_path / "parts").write_text("")  # root may write into any folder, but into no file as if it were one
    again = fetch_lora(references["hugging face"], settings(web, tmp_path), FAST)
    assert (again.origin, again.path.read_bytes()) == ("disk", LORA)
    assert "The copy in the LoRA cache is used." in caplog.text
    data = fetch_lora(f"data:;base64,{base64.b64encode(other).decode()}", settings(web, tmp_path), FAST)
    assert data.path.read_bytes() == other
    assert tmp_path not in data.path.parents
    with pytest.raises(LoraError, match=r"^LORA_CACHE_DIR is .*, which cannot be used: File exists\.$"):
        fetch_lora(references["civitai"], settings(web, tmp_path), FAST)


def test_a_disk_that_is_nearly_full_costs_the_least_recently_used(
    web: Web, fetch: Callable[..., FetchedLora], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LORA_CACHE_GB is larger than the disk, which has room for two and a half."""

    def disk_usage(_path: Path) -> Any:
        used = sum(
            file.stat().st_size for file in tmp_path.rglob("*") if file.is_file() and file.parent.name == "files"
        )
        return shutil._ntuple_diskusage(0, 0, len(LORA) * 5 // 2 - used)  # type: ignore[attr-defined]

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    kept = []
    for seed in range(4):
        web.files[f"/{seed}.safetensors"] = lora_file(seed)
        kept.append(fetch(f"{web.url}/{seed}.safetensors").path)
    assert [path.exists() for path in kept] == [False, False, True, True]
    web.files["/huge.safetensors"] = lora_file(9, columns=9999)
    with pytest.raises(LoraError, match=r"GB free and .* GB are needed"):
        fetch(f"{web.url}/huge.safetensors")
    assert [path.exists() for path in kept] == [False, False, True, True]


@pytest.mark.skipif(os.name != "posix", reason="no umask")
def test_users_of_one_group_may_share_a_cache(web: Web, fetch: Callable[..., FetchedLora], tmp_path: Path) -> None:
    before = os.umask(0o002)
    try:
        fetch(hubs(web)["hugging face"])
    finally:
        os.umask(before)
    made = list(tmp_path.rglob("*"))
    assert len(made) > 6
    assert all(path.stat().st_mode & 0o020 for path in made)


def test_a_folder_that_cannot_be_used_is_one_sentence(web: Web, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LoraError, match=r"LORA_CACHE_DIR is .*/file/x, which cannot be used: Not a directory"):
        fetch_lora("a/b", settings(web, tmp_path / "file" / "x"), FAST)


# Cancelling


class Cancelled(BaseException):
    """As Cog's."""


@pytest.mark.parametrize("delay", [0.0, 0.01, 0.03, 0.08, 0.2])
def test_cancelling_at_any_time_leaves_nothing(
    web: Web, fetch: Callable[..., FetchedLora], tmp_path: Path, delay: float
) -> None:
    reference = hubs(web)["civitai"]
    web.fault = Fault(99, wait=threading.Event())
    target = threading.get_ident()

    def cancel() -> None:
        time.sleep(delay)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(target), ctypes.py_object(Cancelled))

    def fetch_and_cancel() -> None:
        threading.Thread(target=cancel).start()
        fetch_lora(reference, settings(web, tmp_path), FetchLimits(segment_bytes=8192))

    started = time.monotonic()
    with pytest.raises(Cancelled):
        fetch_and_cancel()
    assert time.monotonic() - started < 20  # the server waits for longer
    wait_until(lambda: not any(thread.name == "lora" for thread in threading.enumerate()))
    check_cache(tmp_path)
    assert not list(tmp_path.glob("files/*"))
    web.fault = None
    assert fetch(reference).path.read_bytes() == LORA


def test_cancelling_among_dripping_headers_gives_the_lock_back(web: Web, tmp_path: Path) -> None:
    """Each line comes in time, the last of them never does."""
    ended = threading.Event()

    def drip(server: socket.socket) -> None:
        connected, _ = server.accept()
        with connected, suppress(OSError):
            connected.sendall(b"HTTP/1.1 200 OK\r\n")
            while not ended.wait(0.05):
                connected.sendall(b"X-Drip: 1\r\n")

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=drip, args=(server,), daemon=True).start()
        reference = f"http://127.0.0.1:{server.getsockname()[1]}/x.safetensors"
        with pytest.raises(LoraError, match=r"did not arrive within 0\.5 seconds"):
            fetch_lora(reference, settings(web, tmp_path), SHORT_OF_TIME["drip"])
        try:
            wait_until(lambda: not any(thread.name == "lora" for thread in threading.enumerate()), 4)
        finally:
            ended.set()
    check_cache(tmp_path)


def test_a_fetch_for_which_there_is_no_thread_fails_alone(web: Web, fetch: Callable[..., FetchedLora]) -> None:
    reference = hubs(web)["civitai"]
    threading.stack_size(1 << 47)  # more than there are addresses
    try:
        with pytest.raises(RuntimeError, match="can't start new thread"):
            fetch(reference)
    finally:
        threading.stack_size(0)
    assert fetch(reference).path.read_bytes() == LORA


# A fine-tune's own


@pytest.mark.parametrize("content", [LORA, trained(LORA)], ids=["safetensors", "tar"])
def test_an_operators_weights_may_be_here_or_at_any_address(web: Web, tmp_path: Path, content: bytes) -> None:
    """A private host and an address without an ending among them, which no request may name."""
    web.files["/model/weights"] = content
    (tmp_path / "weights").write_bytes(content)
    public_only = settings(web, tmp_path / "cache", LORA_ALLOW_PRIVATE_HOSTS="0")
    for weights in (f"{web.url}/model/weights", str(tmp_path / "weights")):
        assert fetch_weights(weights, public_only, FAST).path.read_bytes() == LORA
    (tmp_path / "weights").write_bytes(content[: len(content) // 2])
    for weights, sentence in {
        f"{web.url}/nothing": "does not exist",
        str(tmp_path): "cannot be read: Is a directory.",
        str(tmp_path / "weights"): "weights",
    }.items():
        with pytest.raises(LoraError, match=re.escape(sentence)) as caught:
            fetch_weights(weights, public_only, FAST)
        assert str(caught.value).endswith(".")


def test_a_file_in_the_operators_folder_is_named_by_its_name_alone(
    web: Web, fetch: Callable[..., FetchedLora], tmp_path: Path
) -> None:
    folder, outside = tmp_path / "loras", tmp_path / "outside.safetensors"
    (folder / "inner").mkdir(parents=True)
    for file in (folder / "my own.safetensors", folder / "inner" / "x.safetensors", outside):
        file.write_bytes(LORA)
    (folder / "link.safetensors").symlink_to(outside)
    (folder / "other.txt").write_bytes(LORA)
    allowed = {"LORA_FOLDER": str(folder)}
    fetched = fetch(" my own.safetensors ", **allowed)
    assert (fetched.read(content), fetched.name) == (LORA, "my own.safetensors")
    (folder / "my own.safetensors").write_bytes(lora_file(1))
    assert fetch("my own.safetensors", **allowed).read(content) == lora_file(1)
    (folder / "broken.safetensors").write_bytes(LORA[:-1])
    with pytest.raises(LoraError, match=r"^broken\.safetensors is not a whole safetensors file"):
        fetch("broken.safetensors", **allowed)
    with pytest.raises(LoraError, match="is the name of a file, and LORA_FOLDER names no folder"):
        fetch("my own.safetensors")
    for name in ("link.safetensors", "nothing.safetensors"):
        with pytest.raises(LoraError, match=f"LORA_FOLDER has no file '{name}'"):
            fetch(name, **allowed)
    for name in (
        "../outside.safetensors",
        str(outside),
        "inner/x.safetensors",
        "other.txt",
        "..%2Foutside.safetensors",
    ):
        with pytest.raises(LoraError, match="does not name a LoRA"):
            fetch(name, **allowed)
    assert not web.asked


def test_a_file_in_the_operators_folder_is_read_where_it_lies(
    web: Web, fetch: Callable[..., FetchedLora], tmp_path: Path
) -> None:
    """Without a copy, and never as another than the one whose hash is known."""
    path = tmp_path / "loras" / "mine.safetensors"
    path.parent.mkdir()
    path.write_bytes(LORA)
    allowed = {"LORA_FOLDER": str(path.parent)}
    fetched = fetch("mine.safetensors", **allowed)
    assert (fetched.path, fetched.origin, fetched.sha256) == (path, "disk", hashlib.sha256(LORA).hexdigest())
    assert not list(tmp_path.glob("files/*"))

    contents = [lora_file(1, 2600), lora_file(2, 2700), lora_file(3, 2800)]

    def read(fetched: FetchedLora) -> tuple[str, bytes]:
        """Its owner changes the file first, as often as there are contents."""
        if contents:
            path.write_bytes(contents.pop())
        return fetched.sha256, content(fetched)

    with pytest.raises(LoraError, match=r"mine\.safetensors was changed while it was read"):
        fetch("mine.safetensors", **allowed).read(read)
    last = lora_file(1, 2600)
    assert fetch("mine.safetensors", **allowed).read(read) == (hashlib.sha256(last).hexdigest(), last)


# Trigger words


def words(fetched: FetchedLora) -> tuple[str, ...]:
    return describe(read_header(fetched.path, fetched.name)).trigger_words


def test_trigger_words_come_with_the_file(web: Web, fetch: Callable[..., FetchedLora]) -> None:
    """From wherever they are published; the tensors are as they were, and the cache keeps both."""
    web.civitai(7, {70: ("Flux.1 D", LORA)})
    web.pages["/api/v1/models/7"]["modelVersions"][0]["trainedWords"] = ["ohwx man,", " TOK ", None, "ohwx man"]
    config = b"job: extension\nconfig:\n  process:\n  - type: sd_trainer\n    trigger_word: 'TOK' # x\n"
    web.replicate("fofr/cars", tar_file({"out/lora.safetensors": LORA, "out/config.yaml": config}))
    web.replicate(
        "fofr/none", tar_file({"lora.safetensors": LORA, "config.yaml": b"# trigger_word: a\ntrigger_word: null"})
    )
    web.hugging_face("a/instance", {"x.safetensors": LORA}, card={"instance_prompt": "a photo of sks dog"})
    widget = [{"text": "A cat, in the style of TOK"}, {"text": "two dogs in the style of TOK"}, {"output": {}}]
    web.hugging_face("a/widget", {"x.safetensors": LORA}, card={"widget": widget, "instance_prompt": None})
    web.hugging_face("a/nothing", {"x.safetensors": LORA}, card={"widget": "x"})
    expected = {
        "civitai.com/models/7": ("ohwx man", "TOK"),
        "fofr/cars": ("TOK",),
        "fofr/none": (),
        "huggingface.co/a/instance": ("a photo of sks dog",),
        "huggingface.co/a/widget": ("TOK",),
        "huggingface.co/a/nothing": (),
    }
    for reference, found in expected.items():
        for origin in ("download", "disk"):
            fetched = fetch(reference)
            assert (words(fetched), fetched.origin) == (found, origin)
            assert safetensors_bytes(fetched.read(content)) == safetensors_bytes(LORA)


FLAGS = {"allowNoCredit": False, "allowCommercialUse": ["Image", "RentCivit"], "allowDerivatives": True}
SAID = "credit to the author; commercial use: images, CivitAI's own generator; merges may be shared"


@pytest.mark.parametrize(
    ("published", "licence"),
    [
        ({}, None),
        ({"license": "apache-2.0"}, "apache-2.0"),
        ({"license": "other"}, "other"),
        (
            {"license": "other", "license_name": "flux-1-dev", "license_link": "https://x.example/LICENSE.md"},
            "flux-1-dev, https://x.example/LICENSE.md",
        ),
        ({"license": ["mit", 5, "cc0-1.0"], "license_name": 5, "license_link": "LICENSE.md"}, "mit, cc0-1.0"),
        ({**FLAGS, "allowDifferentLicense": False}, f"{SAID}; merges under the same permissions"),
        ({**FLAGS, "allowCommercialUse": "{Image,RentCivit}", "allowDifferentLicense": True}, SAID),
        (
            {**FLAGS, "allowNoCredit": True, "allowCommercialUse": None, "allowDerivatives": False,
             "allowDifferentLicense": True},
            "no credit needed; commercial use: none; no merges",
        ),
        (FLAGS, None),
    ],
)  # fmt: skip
def test_the_licence_comes_with_the_file(
    web: Web, fetch: Callable[..., FetchedLora], published: dict[str, Any], licence: str | None
) -> None:
    if "allowNoCredit" in published:
        web.civitai(7, {70: ("Flux.1 D", LORA)})
        web.pages["/api/v1/models/7"] |= published
    else:
        web.hugging_face("acme/lora", {"x.safetensors": LORA}, card=published)
    fetched = fetch("civitai.com/models/7" if "allowNoCredit" in published else "huggingface.co/acme/lora")
    assert describe(read_header(fetched.path, fetched.name)).license == licence


# The command


def test_the_command_prints_the_path_or_one_sentence(web: Web, tmp_path: Path) -> None:
    def lora(reference: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [ROOT / "script" / "lora", reference],
            env={**os.environ, **variables(web, tmp_path / "cache")},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    done = lora(hubs(web)["replicate"])
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).read_bytes() == LORA
    assert "fofr/cars: fetched 0.0 MB" in done.stderr
    for fact in ("trigger words: none are known", "written by: diffusers", "kinds: LoRA", "rank: 4", "layers: 1"):
        assert f"\n{fact}\n" in done.stderr
    demo = (ROOT / "weights" / "demo-loras" / "sunset-kohya.safetensors").read_bytes()
    web.files["/sunset.safetensors"] = demo
    facts = lora(f"{web.url}/sunset.safetensors").stderr
    for fact in ("trigger words: TOK", "title: sunset", "base model: flux-1-dev/lora", "written by: kohya"):
        assert f"\n{fact}\n" in facts
    failed = lora("nonsense")
    assert (failed.returncode, failed.stdout) == (1, "")
    assert failed.stderr.startswith("'nonsense' does not name a LoRA: use ")
    assert json.dumps(failed.stderr).count("\\n") == 1
