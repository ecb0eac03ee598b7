"""Pictures drawn for one browser: requests sent one after another, followed, cancelled, and kept."""

import time
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from threading import Event
from typing import Any

import gradio as gr
import httpx

from play import views
from play.fields import OUTPUTS, SEED, Field
from play.files import Files
from play.page import LORA_NAMES, Page
from play.predictions import Answer, Problem, Request, Server
from play.progress import readable
from play.triggers import words_of_answer
from play.updates import (
    Updates,
    show_details,
    show_history,
    show_problems,
    show_running,
    show_words,
    trigger_words,
)
from play.views import Picture

Data = Mapping[Any, Any]  # the components' values
Steps = Generator[Updates, None, None]
Show = Callable[[list[Picture]], Updates]  # where the pictures that are drawn so far are shown

BLOCKED = "images_blocked"  # a metric: how many pictures are left out


@dataclass(frozen=True)
class Drawing:
    """What draws for the page at `address`."""

    page: Page
    server: Server
    fields: Mapping[str, Field]
    files: Files
    address: str
    stops: dict[str | None, Event] = field(default_factory=dict)  # by the browser's session

    def draw(self, data: Data, client: gr.Request, requests: Mapping[str, Request], show: Show) -> Steps:
        """The requests, each under what is special about it, until one fails or is cancelled."""
        page, told = self.page, dict(data[self.page.words])
        pictures: list[Picture] = list(data[page.pictures])
        drawn: list[Picture] = []
        stop = self.stops[client.session_hash] = Event()
        started = time.monotonic()
        answer = Answer()
        yield show_problems(page, ()) | show_running(page, running=True)
        for done, (about, request) in enumerate(requests.items()):
            answer = yield from self._follow(request, stop, done, len(requests))
            new, answer = self._keep(request, answer, about, len(pictures) + 1)
            if not new:
                break
            pictures, drawn = pictures + new, drawn + new
            told |= dict.fromkeys(_loras(request), words_of_answer(answer.metrics, answer.log))
            words = show_words(page, trigger_words(request, told), request)
            yield show(drawn) | show_history(page, pictures) | words | {page.words: told}
        end = _summary(answer, len(drawn), time.monotonic() - started)
        yield self._end(answer, end) | (self.details(drawn[-1]) if drawn else {})

    def cancel(self, client: gr.Request) -> None:
        """Stop what this browser's session has begun."""
        if stop := self.stops.get(client.session_hash):
            stop.set()

    def details(self, picture: Picture) -> Updates:
        return show_details(self.page, picture, self.server.url, self.address)

    def _follow(self, request: Request, stop: Event, done: int, requests: int) -> Generator[Updates, None, Answer]:
        """Shows the bar and the log while the request is being served."""
        shown: Updates = {}
        with closing(self.server.predict(request, stop)) as running:
            while True:
                try:
                    now = next(running)
                except StopIteration as end:
                    answer: Answer = end.value
                    return answer
                log = views.log(readable(now.log))
                updates = {self.page.progress: views.bar(now, done, requests), self.page.details.log: log}
                if updates != shown:
                    yield updates
                shown = updates

    def _keep(self, request: Request, answer: Answer, about: str, number: int) -> tuple[list[Picture], Answer]:
        """The answer's pictures, numbered from `number`; none if one of them cannot be had, which the answer then says.

        Picture i is the one that seed + i gives alone, unless some before it were held back.
        """
        single = SEED in answer.metrics and SEED in self.fields and not answer.metrics.get(BLOCKED)
        pictures = []
        try:
            for i, url in enumerate(answer.outputs):
                seed = {SEED: answer.metrics[SEED] + i} if single else {}
                own = {name: value for name, value in request.items() if not (single and name == OUTPUTS)} | seed
                file = self.files.add_picture(url, f"picture-{number + i}")
                pictures.append(Picture(number + i, file, own, answer.metrics | seed, answer.log, about))
        except (ValueError, httpx.HTTPError) as error:
            return [], Answer(problems=(Problem(f"A picture that was drawn cannot be fetched ({error})."),))
        return pictures, answer

    def _end(self, answer: Answer, sentence: str) -> Updates:
        page = self.page
        log = {page.details.log: views.log(readable(answer.log))}
        problems = show_problems(page, answer.problems)
        return problems | log | {page.progress: views.status(sentence)}


def _loras(request: Request) -> list[str]:
    return [str(request[name]) for name in LORA_NAMES if name in request]


def _summary(answer: Answer, drawn: int, seconds: float) -> str:
    """How it ended, in one sentence."""
    pictures = "1 picture" if drawn == 1 else f"{drawn} pictures"
    if answer.problems:
        return f"Not drawn after {pictures}: see what is wrong." if drawn else "Not drawn: see what is wrong."
    if answer.cancelled:
        return f"Cancelled after {pictures}." if drawn else "Cancelled."
    blocked = answer.metrics.get(BLOCKED)
    held_back = f" The safety checker held back {blocked}." if blocked else ""
    return f"{pictures} in {seconds:.1f} s.{held_back}"
