"""What is to be shown where: the updates of the page's components, for each thing that can be shown."""

from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr

from play import recipes, views
from play.fields import PROMPT, Field
from play.files import File
from play.inputs import to_values
from play.page import LORA_NAMES, Page
from play.predictions import Problem, Request
from play.progress import readable
from play.triggers import missing_words, words_of_file
from play.views import Picture

Updates = dict[Any, Any]  # by component; what its value becomes, or gr.update(...)


def show_problems(page: Page, problems: Sequence[Problem]) -> Updates:
    """Each at the input that it is about, whose group is opened; none: those of the last time go."""
    inputs = page.inputs
    sentences: dict[str | None, list[str]] = {}
    for problem in problems:
        sentences.setdefault(problem.name if problem.name in inputs.problems else None, []).append(problem.sentence)
    places: dict[str | None, gr.HTML] = {None: page.problem} | inputs.problems
    updates: Updates = {
        place: gr.update(value=views.problem(sentences.get(name, [])), visible=name in sentences)
        for name, place in places.items()
    }
    opened = {inputs.groups[name] for name in sentences if name in inputs.groups}
    return updates | dict.fromkeys(opened, gr.update(open=True))


def show_running(page: Page, *, running: bool) -> Updates:
    """Only one of drawing and cancelling can be asked for."""
    buttons = (page.draw, page.sheet.draw, page.sheet.strip, page.sheet.grid)
    return dict.fromkeys(buttons, gr.update(interactive=not running)) | {page.cancel: gr.update(interactive=running)}


def show_history(page: Page, pictures: list[Picture]) -> Updates:
    """All pictures, and under the slider the last two."""
    names = [(picture.caption, picture.number) for picture in pictures]
    last = pictures[-2:] if len(pictures) > 1 else [None, None]
    sides = {
        side: gr.update(choices=names, value=picture and picture.number)
        for side, picture in zip(page.sides, last, strict=True)
    }
    return {
        page.pictures: pictures,
        page.history: views.choices(pictures),
        page.comparison: views.comparison(*last),
        **sides,
    }


def show_details(page: Page, picture: Picture, server: str, address: str) -> Updates:
    """How the picture was made; it becomes the chosen one."""
    details, request = page.details, picture.request
    return {
        page.chosen: picture.number,
        details.about: views.details(picture),
        details.files: views.downloads(recipes.files_of(request)),
        details.curl: views.code(recipes.as_curl(server, request), "curl"),
        details.python: views.code(recipes.as_python(server, request), "Python"),
        details.link: views.link(recipes.as_link(address, request)),
        details.all: gr.update(visible=True),
        details.log: views.log(readable(picture.log)),
    }


def show_inputs(page: Page, fields: Mapping[str, Field], request: Request) -> Updates:
    """The request's inputs; the others as the server has them by default. Groups with other inputs are opened."""
    values = to_values(fields, request)
    opened = {page.inputs.groups[name] for name in request if name != PROMPT}
    updates: Updates = {component: gr.update(value=values[name]) for name, component in page.inputs.values.items()}
    return updates | dict.fromkeys(opened, gr.update(open=True))


def trigger_words(request: Request, told: Mapping[str, Sequence[str]]) -> list[str]:
    """Those of the request's LoRAs: from a chosen file's metadata, or `told` by the server with an earlier picture."""
    words: list[str] = []
    for name in LORA_NAMES:
        reference = request.get(name)
        if isinstance(reference, File):
            words += words_of_file(reference.path)
        words += told.get(str(reference), ())
    return list(dict.fromkeys(words))


def show_words(page: Page, words: Sequence[str], request: Request) -> Updates:
    html = views.words(words, missing_words(words, request.get(PROMPT, "")))
    return {page.inputs.words: gr.update(value=html, visible=bool(words))}
