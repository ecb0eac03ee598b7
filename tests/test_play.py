"""The page of script/play, used in a real Chromium as a person uses it, on the demo model; and its parts without one.

It runs in the page's own environment, without what the other tests share: script/test-play.
"""

import json
import os
import re
import shutil
import signal
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

import pytest
from PIL import Image, ImageChops

pytest.importorskip("gradio", reason="the page's tests run in its own environment: script/test-play")

from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from play.fields import Field
from play.files import Files
from play.predictions import named_input
from play.progress import Bar, last_bar, readable
from play.recipes import as_curl, as_link, as_python, from_link
from play.sheet import CELL, EMPTY, FONT_SIZE, GAP, MARGIN, contact_sheet
from play.sweeps import read_axis, sweep, sweepable, wrong_with
from play.triggers import words_of_answer, words_of_file

ROOT = Path(__file__).parent.parent
PYTHON = ROOT / ".venv" / "bin" / "python"  # has requests, as whoever copies the recipe
SUNSET = ROOT / "weights" / "demo-loras" / "sunset.safetensors"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
PATIENCE = 60_000  # milliseconds, for pictures on a busy machine
CIRCLE = {"prompt": "a large red circle on a white background", "seed": 7, "megapixels": "0.25", "output_format": "png"}
QUICK = CIRCLE | {"model": "schnell", "num_inference_steps": 4}
SMALL = QUICK | {"aspect_ratio": "custom", "width": 256, "height": 256, "num_inference_steps": 1}


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """script/play with a server of its own, until Ctrl-C."""
    own = {"OMP_NUM_THREADS": "1", "LORA_CACHE_DIR": str(tmp_path_factory.mktemp("loras"))}
    environment = {name: value for name, value in os.environ.items() if not name.endswith("DISPLAY")} | own
    command = [ROOT / "script" / "play", "--port", "0"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as play:
        assert play.stderr is not None
        log = []
        found = None
        for line in play.stderr:
            log.append(line)
            if found := re.search(r"The page is at (\S+);", line):
                break
        assert found, "".join(log)
        rest = threading.Thread(target=lambda: log.extend(play.stderr or ()))
        rest.start()
        yield found.group(1)
        play.send_signal(signal.SIGINT)
        assert play.wait(30) == 0
        rest.join()
    assert "Traceback" not in "".join(log)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on this machine (on Debian: apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def session(chromium: Browser, address: str) -> Iterator[BrowserContext]:
    """A browser without a past; it must have asked nobody but the page, and complained of nothing."""
    session = chromium.new_context(viewport={"width": 1280, "height": 900})
    asked: list[str] = []
    errors: list[str] = []
    session.on("request", lambda request: asked.append(request.url))
    session.on("weberror", lambda error: errors.append(str(error.error)))
    session.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    yield session
    session.close()
    assert [url for url in asked if not url.startswith((f"{address}/", "data:", "blob:"))] == []
    assert errors == []


@pytest.fixture
def opened(session: BrowserContext, address: str) -> Callable[..., Page]:
    """A tab with the page and these inputs, which its address brings."""

    def opened(**inputs: Any) -> Page:
        page = session.new_page()
        page.goto(f"{address}/?{urlencode(inputs)}")
        expect(page.locator("#progress")).to_contain_text("of the link", timeout=PATIENCE)
        return page

    return opened


def draw(page: Page, number: int = 1) -> bytes:
    """The file of picture `number` of this tab, which is drawn now."""
    page.get_by_role("button", name="Draw", exact=True).click()
    drawn = page.locator("#result img").first
    expect(drawn).to_have_attribute("alt", re.compile(f"^Picture #{number},"), timeout=PATIENCE)
    return page.request.get(drawn.evaluate("image => image.src")).body()


def pixels(content: bytes) -> Image.Image:
    return Image.open(BytesIO(content)).convert("RGB")


def colour(content: bytes, x: int, y: int) -> tuple[int, int, int]:
    red, green, blue = pixels(content).crop((x, y, x + 1, y + 1)).tobytes()
    return red, green, blue


def with_metadata(metadata: dict[str, str]) -> bytes:
    """The demo's LoRA with this metadata in its header."""
    content = SUNSET.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.dumps(json.loads(content[8 : 8 + length]) | {"__metadata__": metadata}).encode()
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


def test_it_draws_the_red_circle_and_each_recipe_draws_it_again(opened: Callable[..., Page], tmp_path: Path) -> None:
    page = opened(**QUICK)
    content = draw(page)
    assert pixels(content).size == (512, 512)
    red, green, blue = colour(content, 256, 256)
    assert red > 150
    assert max(green, blue) < 100
    assert min(colour(content, 20, 20)) > 200
    assert page.locator("#result img").get_attribute("alt") == f"Picture #1, seed 7: {QUICK['prompt']}"
    curl = page.locator("#curl pre").text_content()
    page.get_by_role("tab", name="Python").click()
    python = page.locator("#python pre").text_content()
    for command in (["bash", "-c", curl], [PYTHON, "-c", python]):
        subprocess.run(command, cwd=tmp_path, check=True, timeout=60)
        assert (tmp_path / "picture.png").read_bytes() == content
        (tmp_path / "picture.png").unlink()
    page.get_by_role("tab", name="Link").click()
    link = str(page.locator("#link a").get_attribute("href"))
    assert dict(parse_qsl(urlsplit(link).query)) == {name: str(value) for name, value in QUICK.items()}
    assert draw(opened(**dict(parse_qsl(urlsplit(link).query)))) == content


def test_a_lora_gives_its_trigger_word_and_follows_its_slider(opened: Callable[..., Page], tmp_path: Path) -> None:
    lora = tmp_path / "sunset.safetensors"
    lora.write_bytes(with_metadata({"modelspec.trigger_phrase": "TOK"}))
    page = opened(**SMALL | {"model": "dev", "num_inference_steps": 6})
    page.locator("#field-replicate_weights input[type=file]").set_input_files(lora)
    page.get_by_role("button", name="TOK").click()
    expect(page.get_by_label("Prompt").first).to_have_value(f"{CIRCLE['prompt']} TOK")
    red, _, blue = colour(draw(page), 128, 250)
    assert red - blue > 60  # the sunset
    slider = page.locator("#input-lora_scale input[type=range]")
    slider.press("Home")
    red, _, blue = colour(draw(page, 2), 128, 250)
    assert red - blue < 20
    assert '"lora_scale": -1' in page.locator("#curl pre").inner_text()


def test_what_is_painted_is_repainted_and_nothing_else(opened: Callable[..., Page]) -> None:
    given = ROOT / "docs" / "input.png"
    page = opened(**QUICK | {"prompt": "a large white circle on a white background"}, prompt_strength=0.95)
    page.locator("#input-image [data-role=picture]").set_input_files(given)
    canvas = page.locator("#input-image canvas")
    canvas.hover()  # its middle
    box = canvas.bounding_box()
    assert box is not None
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2 + 40, box["y"] + box["height"] / 2 + 20, steps=4)
    page.mouse.up()
    drawn = pixels(draw(page))
    mask = page.request.get(page.locator("#files a", has_text="mask-").evaluate("link => link.href")).body()
    painted = Image.open(BytesIO(mask)).convert("L")
    assert painted.getextrema() == (0, 255)
    assert 0.001 < sum(painted.histogram()[128:]) / (512 * 512) < 0.1
    changed = ImageChops.difference(drawn, Image.open(given).convert("RGB")).convert("L").point(lambda v: 255 * (v > 0))
    assert changed.getbbox() is not None
    assert ImageChops.subtract(changed, painted.point(lambda v: 255 * (v >= 128))).getbbox() is None


def test_what_the_server_refuses_is_said_at_its_input(opened: Callable[..., Page]) -> None:
    page = opened(**SMALL | {"seed": "x", "replicate_weights": "nobody"})
    page.get_by_role("button", name="More inputs").click()  # folded again
    prompt = page.get_by_label("Prompt").first
    prompt.press("Enter")
    seed = page.locator("#field-seed")
    expect(seed.get_by_role("alert")).to_have_text('"x" is not of type "integer"')
    expect(seed.locator("input")).to_be_focused()
    seed.locator("input").fill("7")
    page.locator("#draw").press("Enter")
    lora = page.locator("#field-replicate_weights")
    expect(lora.get_by_role("alert")).to_contain_text("'nobody' does not name a LoRA:")
    expect(lora.locator("input:not([type=file])")).to_be_focused()
    expect(seed.get_by_role("alert")).to_have_count(0)


def test_a_picture_can_be_cancelled_and_who_waited_gets_theirs(opened: Callable[..., Page]) -> None:
    long, waiting = opened(**CIRCLE, num_inference_steps=50), opened(**SMALL)
    long.locator("#draw").click()
    expect(long.locator("#progress")).to_contain_text(re.compile(r"step \d+ of 50"), timeout=PATIENCE)
    waiting.locator("#draw").click()
    expect(waiting.locator("#progress")).to_contain_text("the server is busy with another request")
    expect(long.locator("#draw")).to_be_disabled()
    long.locator("#cancel").click()
    expect(long.locator("#progress")).to_have_text("Cancelled.", timeout=PATIENCE)
    expect(waiting.locator("#result img")).to_be_visible(timeout=PATIENCE)
    expect(long.locator("#draw")).to_be_enabled()


def test_a_strip_is_drawn_saved_looked_through_and_compared_on_a_phone_in_the_dark(opened: Callable[..., Page]) -> None:
    page = opened(**SMALL)
    page.set_viewport_size({"width": 390, "height": 844})
    page.emulate_media(color_scheme="dark")
    page.get_by_role("tab", name="Sheet").click()
    page.get_by_role("button", name="Strip of strengths").click()
    with page.expect_download() as download:
        page.get_by_role("button", name="Save the sheet").click(timeout=PATIENCE)
    with Image.open(download.value.path()) as sheet:
        assert sheet.size[0] == GAP + 6 * (320 + GAP)
    titles = [f"lora_scale {strength}" for strength in ("-1", "-0.5", "0", "0.5", "1", "1.5")]
    assert page.locator("#sheet th").all_inner_texts() == titles
    page.locator("#sheet td button").nth(1).press("Enter")
    expect(page.locator("#details h2")).to_have_text("How #2, lora_scale -0.5 was made")
    page.get_by_role("tab", name="History").click()
    page.locator("#history button").first.press("Enter")  # the newest
    expect(page.locator("#details h2")).to_have_text("How #6, lora_scale 1.5 was made")
    page.get_by_role("tab", name="Compare").click()
    page.get_by_label("How much of the left picture is shown").press("Home")
    assert page.locator("#comparison .compare").evaluate("one => one.style.getPropertyValue('--left')") == "0%"
    assert page.evaluate("document.scrollingElement.scrollWidth") == 390
    assert page.evaluate("[...document.images].filter((image) => !image.alt).length") == 0
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(15, 14, 13)"


FIELDS = {
    "prompt": Field("prompt", "string", "", None, None, None, ()),
    "image": Field("image", "uri", "", None, None, None, ()),
    "num_outputs": Field("num_outputs", "integer", "", 1, 1, 4, ()),
    "seed": Field("seed", "integer", "", None, None, None, ()),
    "lora_scale": Field("lora_scale", "number", "", 1, -1, 3, ()),
    "go_fast": Field("go_fast", "boolean", "", False, None, None, ()),
    "megapixels": Field("megapixels", "string", "", "1", None, None, ("1", "0.25")),
}


@pytest.fixture
def recorder() -> Iterator[tuple[str, list[Any]]]:
    """The address of a server that answers every request with the same picture, and the bodies it got."""
    bodies: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"status": "succeeded", "output": ["data:image/webp;base64,aGVsbG8="]}')

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", bodies
        server.shutdown()
        thread.join()


def test_recipes_send_what_was_sent_whatever_is_in_it(recorder: tuple[str, list[Any]], tmp_path: Path) -> None:
    url, bodies = recorder
    files = Files(tmp_path)
    given = files.add(b"\x89PNG\r\n", "a $(touch x) 'picture'.png")
    prompt = """it's "a" `touch x` $HOME $(touch x) \\ {{x}} ${y} <b>\n日本 END"""
    plain = {"prompt": prompt, "seed": -(2**63) + 1, "lora_scale": 0.5, "go_fast": True, "megapixels": "0.25"}
    for request in (plain, plain | {"image": given}):
        sent = plain | ({"image": given.data_url()} if "image" in request else {})
        for command in (["bash", "-c", as_curl(url, request)], [PYTHON, "-c", as_python(url, request)]):
            subprocess.run(command, cwd=tmp_path, check=True, timeout=60)
            assert bodies.pop() == {"input": sent}
            assert (tmp_path / "picture.webp").read_bytes() == b"hello"
        query = dict(parse_qsl(urlsplit(as_link("http://127.0.0.1:1", request)).query))
        assert from_link(query, FIELDS, files) == (request, ())
    assert not (tmp_path / "x").exists()


def test_a_link_to_a_file_of_an_earlier_run_says_so(tmp_path: Path) -> None:
    request, problems = from_link(
        {"image": "../../etc/passwd", "seed": "7", "__theme": "dark"}, FIELDS, Files(tmp_path)
    )
    assert request == {"seed": 7}
    assert [problem.name for problem in problems] == ["image"]


@pytest.mark.parametrize(
    ("sentence", "name"),
    [
        ("mask needs image, the picture that it masks.", "mask"),
        ("huggingface.co/a/b does not exist: the repo has no such file.", "extra_lora"),
        ("the data: URI is not a LoRA.", "replicate_weights"),
        ("The safety checker blocked every picture: try another prompt or another seed.", None),
    ],
)
def test_a_failed_predictions_sentence_is_about_the_input_that_it_names_or_quotes(
    tmp_path: Path, sentence: str, name: str | None
) -> None:
    files = Files(tmp_path)
    mask, lora = files.add(b"", "mask.png"), files.add(b"", "lora.safetensors")
    request = {"prompt": "a", "mask": mask, "replicate_weights": lora, "extra_lora": "https://huggingface.co/a/b"}
    assert named_input(sentence, request) == name


def test_trigger_words_come_from_the_file_or_the_server(tmp_path: Path) -> None:
    file = tmp_path / "lora.safetensors"
    for metadata, words in (
        ({"modelspec.trigger_phrase": "TOK, sunset style"}, ["TOK", "sunset style"]),
        ({"ss_tag_frequency": '{"10_a": {"TOK": 9, "sky": 2}, "5_b": {"sky": 4, "TOK": 1}}'}, ["TOK", "sky"]),
        ({"ss_tag_frequency": "[]"}, []),
        ({}, []),
    ):
        file.write_bytes(with_metadata(metadata))
        assert words_of_file(file) == words
    file.write_bytes(b"\xff" * 20)
    assert words_of_file(file) == []
    log = "dev, txt2img\ntrigger words: TOK, sky; none of them is in the prompt\n"
    assert words_of_answer({}, log) == ["TOK", "sky"]
    assert words_of_answer({"lora_trigger_words": "ZOK"}, log) == ["ZOK"]


def test_the_log_of_a_bar_is_its_last_state() -> None:
    log = "read: 0.0 s\n\rdenoising:   0%| | 0/28 [00:00<?]\rdenoising:   4%| | 1/28 [00:02<01:06]"
    assert last_bar(log) == Bar(1, 28)
    assert last_bar("read: 0.0 s\n") is None
    assert readable(log) == "read: 0.0 s\ndenoising:   4%| | 1/28 [00:02<01:06]"


def test_a_sweep_has_a_request_for_each_place_row_by_row() -> None:
    across, down = read_axis(FIELDS["lora_scale"], "0, 0.5, 0.5,"), read_axis(FIELDS["go_fast"], "false, true")
    assert sweepable(FIELDS) == ["seed", "lora_scale", "go_fast", "megapixels"]
    assert wrong_with([across, down]) == ""
    assert wrong_with([across, across]) == "lora_scale cannot go across and down: choose two inputs."
    assert wrong_with([read_axis(FIELDS["seed"], " , ")]) == "Name the values of seed, between commas."
    made = sweep({"prompt": "a"}, across, down)
    assert (made.columns, made.rows) == (["lora_scale 0", "lora_scale 0.5"], ["go_fast false", "go_fast true"])
    assert [(one["lora_scale"], one["go_fast"]) for one in made.requests.values()] == [
        (0, False), (0.5, False), (0, True), (0.5, True),
    ]  # fmt: skip
    assert list(made.requests)[3] == "go_fast true, lora_scale 0.5"


def test_a_contact_sheet_has_each_picture_in_its_place_and_a_missing_one_grey() -> None:
    red, wide = Image.new("RGB", (512, 512), "red"), Image.new("RGBA", (400, 200), "blue")
    sheet = contact_sheet(["a", "b"], {"one": [red, wide], "two": [None, red]})
    assert sheet.size == (GAP + 2 * (CELL + GAP), MARGIN + 2 * (CELL + MARGIN))

    def at(column: int, row: int, x: int, y: int) -> Any:
        return sheet.getpixel((GAP + column * (CELL + GAP) + x, MARGIN + row * (CELL + MARGIN) + y))

    assert at(0, 0, 0, 0) == at(1, 1, CELL - 1, CELL - 1) == (255, 0, 0)
    assert (at(1, 0, 0, 47), at(1, 0, 0, 48), at(1, 0, 0, 144)) == ((255, 255, 255), (0, 0, 255), (255, 255, 255))
    assert "#{:02x}{:02x}{:02x}".format(*at(0, 1, 5, 5)) == EMPTY
    titled = contact_sheet(["a", "b"], {"one": [red, red]}, title="a long title " * 20)
    assert titled.width == sheet.width
    assert titled.height > MARGIN + CELL + MARGIN + 4 * FONT_SIZE
