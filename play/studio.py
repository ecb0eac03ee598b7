"""What happens on the page: the handlers of Gradio's events, and which event calls which."""

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from play import recipes, views
from play.drawing import Data, Drawing, Steps
from play.fields import OUTPUTS, PROMPT, SEED
from play.files import File
from play.inputs import read_request
from play.page import NOTHING
from play.predictions import Problem, Request
from play.sheet import contact_sheet
from play.sweeps import (
    EXTRA_LORA_SCALE,
    GRID_STRENGTHS,
    LORA_SCALE,
    STRENGTHS,
    Axis,
    Sweep,
    read_axis,
    suggested_values,
    sweep,
    wrong_with,
)
from play.triggers import with_word
from play.updates import Updates, show_inputs, show_problems, show_running, show_words, trigger_words
from play.views import Picture

# What is wrong is marked for whoever cannot see it, and the first of it brought into view, unless one types elsewhere.
POINT_OUT = """() => setTimeout(() => {
  for (const field of document.querySelectorAll('.field')) {
    const wrong = field.querySelector('.problem') !== null;
    field.querySelectorAll('input, textarea').forEach((input) => input.setAttribute('aria-invalid', wrong));
  }
  if (document.activeElement.closest('.field:not(#field-prompt)')) return;
  const field = document.querySelector('.problem')?.closest('.field');
  field?.scrollIntoView({block: 'center'});
  field?.querySelector('input, textarea')?.focus({preventScroll: true});
}, 100)"""
SHEET_CELL = 320  # pixels, the longer side of a picture on a saved sheet


@dataclass(frozen=True)
class Studio:
    """The handlers. Each gets the values of components, and returns what they show from now on."""

    drawing: Drawing

    def draw(self, data: Data, client: gr.Request) -> Steps:
        """The pictures of one request."""
        page = self.drawing.page
        yield from self.drawing.draw(
            data, client, {"": self.request(data)}, lambda drawn: {page.result: views.results(drawn)}
        )

    def draw_strip(self, data: Data, client: gr.Request) -> Steps:
        """The LoRA at several strengths: the main one, or the extra one where that is alone."""
        request = self.request(data)
        alone = "extra_lora" in request and "replicate_weights" not in request
        yield from self._draw_sheet(data, client, [self._axis(EXTRA_LORA_SCALE if alone else LORA_SCALE, STRENGTHS)])

    def draw_grid(self, data: Data, client: gr.Request) -> Steps:
        """Two LoRAs, each at several strengths."""
        axes = [self._axis(name, GRID_STRENGTHS) for name in (LORA_SCALE, EXTRA_LORA_SCALE)]
        yield from self._draw_sheet(data, client, axes)

    def draw_sheet(self, data: Data, client: gr.Request) -> Steps:
        """What the axes say."""
        sheet = self.drawing.page.sheet
        axes = [self._axis(data[sheet.across], data[sheet.across_values])]
        if data[sheet.down] != NOTHING:
            axes.append(self._axis(data[sheet.down], data[sheet.down_values]))
        yield from self._draw_sheet(data, client, axes)

    def suggest(self, name: str) -> str:
        """Values for the axis of an input."""
        return "" if name == NOTHING else suggested_values(self.drawing.fields[name])

    def choose(self, data: Data, event: gr.EventData) -> Updates:
        """The details of the picture that was clicked."""
        return self.drawing.details(data[self.drawing.page.pictures][int(event.choice) - 1])

    def compare(self, pictures: list[Picture], left: int | None, right: int | None) -> str:
        return views.comparison(*(pictures[number - 1] if number else None for number in (left, right)))

    def put_back(self, data: Data) -> Updates:
        """The inputs of the chosen picture."""
        page = self.drawing.page
        request = data[page.pictures][data[page.chosen] - 1].request
        return self._bring(request, data) | show_problems(page, ())

    def open_link(self, data: Data, client: gr.Request) -> Updates:
        """The inputs that the page's address names."""
        page = self.drawing.page
        request, problems = recipes.from_link(dict(client.query_params), self.drawing.fields, self.drawing.files)
        if not request and not problems:
            return {page.progress: gr.skip()}
        sentence = "The inputs are those of the link: Draw makes the picture."
        return self._bring(request, data) | show_problems(page, problems) | {page.progress: views.status(sentence)}

    def choose_file(self, path: str) -> str:
        """A LoRA from this machine; its name stands for it in the input."""
        return self.drawing.files.add(Path(path).read_bytes(), Path(path).name).name

    def tell_words(self, data: Data) -> Updates:
        """The trigger words of the LoRAs that are named now."""
        request = self.request(data)
        return show_words(self.drawing.page, trigger_words(request, data[self.drawing.page.words]), request)

    def choose_word(self, data: Data, event: gr.EventData) -> Updates:
        """Put a trigger word into the prompt."""
        page = self.drawing.page
        request = self.request(data)
        request |= {PROMPT: with_word(request.get(PROMPT, ""), event.choice)}
        words = show_words(page, trigger_words(request, data[page.words]), request)
        return {page.inputs.values[PROMPT]: request[PROMPT]} | words

    def request(self, data: Data) -> Request:
        """What the inputs in `data` say now."""
        components = self.drawing.page.inputs.values
        values = {name: data[component] for name, component in components.items() if component in data}
        return read_request(self.drawing.fields, values, self.drawing.files)

    def _bring(self, request: Request, data: Data) -> Updates:
        page = self.drawing.page
        words = show_words(page, trigger_words(request, data[page.words]), request)
        return show_inputs(page, self.drawing.fields, request) | words

    def _axis(self, name: str, text: str) -> Axis:
        return read_axis(self.drawing.fields[name], text)

    def _draw_sheet(self, data: Data, client: gr.Request, axes: list[Axis]) -> Steps:
        page = self.drawing.page
        if wrong := wrong_with(axes):
            yield show_problems(page, [Problem(wrong)])
            return
        base, drawn = self._base(data), list[Picture]()
        what = sweep(base, *axes)
        swept = {axis.name for axis in axes}
        title = ", ".join(_text(name, value) for name, value in base.items() if name not in swept)

        def show(now: list[Picture]) -> Updates:
            drawn[:] = now
            return {page.sheet.table: views.sheet(what.columns, what.rows, now)}

        yield show([]) | {page.sheet.save: gr.update(visible=False)}
        yield from self.drawing.draw(data, client, what.requests, show)
        if drawn:
            yield {page.sheet.save: gr.update(value=self._save(what, drawn, title), visible=True)}

    def _base(self, data: Data) -> Request:
        """What all pictures of a sheet share: one picture each, and the same seed if none is given."""
        request = {name: value for name, value in self.request(data).items() if name != OUTPUTS}
        if SEED in self.drawing.fields and SEED not in request:
            request[SEED] = secrets.randbits(32)
        return request

    def _save(self, what: Sweep, drawn: list[Picture], title: str) -> str:
        """The path of the sheet as a PNG."""
        across = len(what.columns)
        pictures = [Image.open(picture.file.path) for picture in drawn]
        places = pictures + [None] * (len(what.requests) - len(pictures))
        rows = {label: places[i * across : (i + 1) * across] for i, label in enumerate(what.rows)}
        buffer = BytesIO()
        contact_sheet(what.columns, rows, title, SHEET_CELL).save(buffer, "PNG")
        return str(self.drawing.files.add(buffer.getvalue(), "sheet.png").path)


def wire(studio: Studio) -> None:
    """Connect the page's events to the handlers. Only the page may call them, so they are no API.

    The inputs are outputs of nothing but what fills them, so what is typed while a picture is drawn stays.
    """
    page, inputs, sheet = studio.drawing.page, studio.drawing.page.inputs, studio.drawing.page.sheet
    values = list(inputs.values.values())
    named = [inputs.values[name] for name in (PROMPT, *inputs.lora_files)]
    axes = [sheet.across, sheet.across_values, sheet.down, sheet.down_values]
    data = {*values, *axes, page.pictures, page.words}
    parts = [one for one in page.blocks.blocks.values() if isinstance(one, gr.components.Component | gr.Accordion)]
    shown = [page.details.all, *(one for one in parts if one not in values)]
    prompt: Any = inputs.values[PROMPT]
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    draws: list[tuple[list[Any], Callable[..., Steps]]] = [
        ([page.draw.click, prompt.submit], studio.draw),
        ([sheet.strip.click], studio.draw_strip),
        ([sheet.grid.click], studio.draw_grid),
        ([sheet.draw.click], studio.draw_sheet),
    ]
    for triggers, handler in draws:
        drawing = gr.on(triggers, handler, data, shown, concurrency_limit=None, **quiet)
        drawing.then(lambda: show_running(page, running=False), None, shown, **quiet).then(None, js=POINT_OUT)
    page.cancel.click(studio.drawing.cancel, **quiet)
    for chooser in (page.result, page.history, sheet.table):
        chooser.click(studio.choose, {page.pictures}, shown, **quiet)
    for side in page.sides:
        side.input(studio.compare, [page.pictures, *page.sides], page.comparison, **quiet)
    for axis, text in ((sheet.across, sheet.across_values), (sheet.down, sheet.down_values)):
        axis.input(studio.suggest, axis, text, **quiet)
    page.details.put_back.click(studio.put_back, {page.pictures, page.chosen, page.words}, shown + values, **quiet)
    page.blocks.load(studio.open_link, {page.words}, shown + values, **quiet).then(None, js=POINT_OUT)
    inputs.words.click(studio.choose_word, {*named, page.words}, [inputs.words, prompt], **quiet)
    for name, button in inputs.lora_files.items():
        reference: Any = inputs.values[name]
        chosen = button.upload(studio.choose_file, button, reference, **quiet)
        chosen.then(studio.tell_words, {*named, page.words}, [inputs.words], **quiet)
        reference.blur(studio.tell_words, {*named, page.words}, [inputs.words], **quiet)


def _text(name: str, value: object) -> str:
    shown = value.name if isinstance(value, File) else value
    return str(shown) if name == PROMPT else f"{name} {shown}"
