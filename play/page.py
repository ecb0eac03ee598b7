"""The page: what stands where. play/studio.py says what happens."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape

import gradio as gr

from play import views
from play.fields import LORAS, MORE, PICTURE, PROMPT, Field, grouped
from play.inputs import MASK, component, has_painter
from play.sweeps import EXTRA_LORA_SCALE, LORA_SCALE, sweepable

NOTHING = "nothing"  # the choice of an axis that a strip does not have
LORA_NAMES = ("replicate_weights", "extra_lora")
SIDES = ("Left", "Right")


@dataclass(frozen=True)
class Inputs:
    """One component for each input, by the inputs' names, and what belongs to it."""

    values: dict[str, gr.components.Component]
    problems: dict[str, gr.HTML]
    groups: dict[str, gr.Accordion]  # the group that each but the prompt stands in
    lora_files: dict[str, gr.UploadButton]
    words: gr.HTML  # the LoRAs' trigger words


@dataclass(frozen=True)
class Sheet:
    """What to compare, and the sheet."""

    strip: gr.Button
    grid: gr.Button
    across: gr.Dropdown
    across_values: gr.Textbox
    down: gr.Dropdown
    down_values: gr.Textbox
    draw: gr.Button
    table: gr.HTML
    save: gr.DownloadButton


@dataclass(frozen=True)
class Details:
    """How the chosen picture was made."""

    all: gr.Column  # without the log, which is there while the first picture is being drawn
    about: gr.HTML
    files: gr.HTML
    curl: gr.HTML
    python: gr.HTML
    link: gr.HTML
    put_back: gr.Button
    log: gr.HTML


@dataclass(frozen=True)
class Page:
    """All that something happens to."""

    blocks: gr.Blocks
    inputs: Inputs
    draw: gr.Button
    cancel: gr.Button
    problem: gr.HTML  # what is wrong and about no input
    progress: gr.HTML
    result: gr.HTML
    sheet: Sheet
    history: gr.HTML
    sides: tuple[gr.Dropdown, ...]  # left and right
    comparison: gr.HTML
    details: Details
    pictures: gr.State  # list[views.Picture]: all of this session
    chosen: gr.State  # the number of the picture that the details are about, or None
    words: gr.State  # dict[str, list[str]]: the trigger words that the server told, by LoRA


def build_page(server: str, fields: Mapping[str, Field]) -> Page:
    """The page for the server at that address, with the inputs that it takes."""
    with gr.Blocks(title="flux-lora", analytics_enabled=False, fill_width=True) as blocks:
        gr.HTML(f"<h1>flux-lora</h1><p>Server: {escape(server)}</p>", elem_id="head")
        values, problems = {}, {}
        with gr.Row(elem_id="ask"):
            with gr.Column(scale=5, min_width=300), _field(PROMPT) as problems[PROMPT]:
                values[PROMPT] = component(fields[PROMPT], fields)
            with gr.Column(scale=1, min_width=120):
                draw = gr.Button("Draw", variant="primary", elem_id="draw")
                cancel = gr.Button("Cancel", variant="stop", interactive=False, elem_id="cancel")
        problem = gr.HTML(visible=False, elem_id="problem")
        progress = gr.HTML(views.status("Ready."), elem_id="progress")
        with gr.Row():
            with gr.Column(scale=3, min_width=320, elem_id="pictures"):
                with gr.Tab("Picture"):
                    result = _chooser(views.results([]), "result")
                with gr.Tab("Sheet"):
                    sheet = _sheet(fields)
                with gr.Tab("History"):
                    history = _chooser(views.choices([]), "history")
                with gr.Tab("Compare"):
                    with gr.Row():
                        sides = tuple(gr.Dropdown([], label=side, elem_id=side.lower()) for side in SIDES)
                    comparison = gr.HTML(views.comparison(None, None), elem_id="comparison")
                details = _details()
            with gr.Column(scale=2, min_width=320, elem_id="inputs"):
                inputs = _inputs(fields, values, problems)
        return Page(
            blocks, inputs, draw, cancel, problem, progress, result, sheet, history, sides, comparison, details,
            pictures=gr.State([]), chosen=gr.State(None), words=gr.State({}),
        )  # fmt: skip


@contextmanager
def _field(name: str) -> Iterator[gr.HTML]:
    """The place of one input; gives the place under it for what is wrong with it."""
    problem = gr.HTML(visible=False, render=False)
    with gr.Column(elem_classes="field", elem_id=f"field-{name}", min_width=0):
        yield problem
        problem.render()


def _chooser(value: str, identity: str) -> gr.HTML:
    """Pictures of which a click chooses one."""
    return gr.HTML(value, elem_id=identity, js_on_load=views.CHOOSE)


def _inputs(
    fields: Mapping[str, Field], values: dict[str, gr.components.Component], problems: dict[str, gr.HTML]
) -> Inputs:
    """Adds to `values` and `problems`, which have the prompt."""
    groups, lora_files = {}, {}
    words = gr.HTML(elem_id="words", js_on_load=views.CHOOSE, visible=False, render=False)
    for title, names in grouped(fields).items():
        with gr.Accordion(title, open=title not in (PICTURE, MORE)) as group:
            for name in names:
                groups[name] = group
                with _field(name) as problems[name]:
                    if name == MASK and has_painter(fields):
                        continue
                    values[name] = component(fields[name], fields)
                    if name in LORA_NAMES:
                        lora_files[name] = gr.UploadButton(
                            "Choose a file", file_types=[".safetensors"], size="sm", elem_id=f"file-{name}"
                        )
            if title == LORAS:
                words.render()
    return Inputs(values, problems, groups, lora_files, words)


def _sheet(fields: Mapping[str, Field]) -> Sheet:
    names = sweepable(fields)
    with gr.Row():
        strip = gr.Button("Strip of strengths", size="md", elem_id="strip", visible=LORA_SCALE in fields)
        grid = gr.Button("Grid of two LoRAs", size="md", elem_id="grid", visible=EXTRA_LORA_SCALE in fields)
    with gr.Accordion("Compare anything else", open=False):
        with gr.Row():
            across = gr.Dropdown(names, value=names[0], label="Across", min_width=120, elem_id="across")
            across_values = gr.Textbox(label="Values", info="Between commas.", min_width=120, elem_id="across-values")
        with gr.Row():
            down = gr.Dropdown([NOTHING, *names], value=NOTHING, label="Down", min_width=120, elem_id="down")
            down_values = gr.Textbox(label="Values", info="Between commas.", min_width=120, elem_id="down-values")
        draw = gr.Button("Draw the sheet", size="md", elem_id="draw-sheet")
    table = _chooser(views.sheet([], [], []), "sheet")
    save = gr.DownloadButton("Save the sheet as PNG", size="md", visible=False, elem_id="save-sheet")
    return Sheet(strip, grid, across, across_values, down, down_values, draw, table, save)


def _details() -> Details:
    with gr.Column(visible=False) as everything:
        about = gr.HTML(elem_id="details")
        with gr.Tab("curl"):
            curl = gr.HTML(elem_id="curl", js_on_load=views.COPY)
        with gr.Tab("Python"):
            python = gr.HTML(elem_id="python", js_on_load=views.COPY)
        with gr.Tab("Link"):
            link = gr.HTML(elem_id="link", js_on_load=views.COPY)
            put_back = gr.Button("Put these inputs back", size="sm", elem_id="put-back")
        files = gr.HTML(elem_id="files")
    with gr.Accordion("Server log", open=False):
        log = gr.HTML(views.log(""), elem_id="log")
    return Details(everything, about, files, curl, python, link, put_back, log)
