"""The request that made a picture, to be made again: as curl, as Python, and as a link to the page."""

import json
import shlex
from collections.abc import Mapping
from pprint import pformat
from typing import Any
from urllib.parse import urlencode

from play.fields import Field, typed
from play.files import File, Files
from play.predictions import Problem, Request

WIDTH = 100  # characters of a line of Python

PYTHON = """import base64
{imports}import requests
{helper}
answer = requests.post(
    "{url}/predictions",
    json={{"input": {inputs}}},
).json()
assert answer.get("status") == "succeeded", answer
with open("{picture}", "wb") as file:
    file.write(base64.b64decode(answer["output"][0].split(",", 1)[1]))
"""
DATA_URL = """

def data_url(name):
    kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
    with open(name, "rb") as file:
        return f"data:{kind};base64,{base64.b64encode(file.read()).decode()}"

"""


class Source(str):
    """Python source that stands among values as itself, without quotes."""

    def __repr__(self) -> str:
        return str(self)


def as_curl(url: str, request: Request) -> str:
    """A shell command that writes answer.json and the picture; it reads the request's files in its own folder."""
    to_picture = "| tee answer.json | grep -o 'base64,[^\"]*' | head -1 | cut -d, -f2 | base64 --decode > "
    to_picture += _picture_name(request)
    post = f"curl -s {shlex.quote(f'{url}/predictions')} -H 'Content-Type: application/json' -d"
    if not files_of(request):
        return f"{post} {shlex.quote(json.dumps({'input': request}, ensure_ascii=False))} \\\n  {to_picture}"
    inputs = ", ".join(f"{json.dumps(name)}: {_in_here_document(value)}" for name, value in request.items())
    return f'{post} @- <<END \\\n  {to_picture}\n{{"input": {{{inputs}}}}}\nEND'


def as_python(url: str, request: Request) -> str:
    """A program that writes the picture; it reads the request's files in its own folder."""
    values = {
        name: Source(f'data_url("{value.name}")') if isinstance(value, File) else value
        for name, value in request.items()
    }
    inputs = pformat(values, sort_dicts=False, width=WIDTH)
    files = files_of(request)
    return PYTHON.format(
        imports="import mimetypes\n" if files else "",
        helper=DATA_URL if files else "",
        url=url,
        inputs=inputs.replace("\n", "\n" + " " * len('    json={"input": ')),
        picture=_picture_name(request),
    )


def as_link(page: str, request: Request) -> str:
    """The page's address with the inputs; files by their names, so such a link works as long as the page runs."""
    values = {name: value.name if isinstance(value, File) else _text(value) for name, value in request.items()}
    return f"{page}/?{urlencode(values)}"


def from_link(
    query: Mapping[str, str], fields: Mapping[str, Field], files: Files
) -> tuple[Request, tuple[Problem, ...]]:
    """The inputs that a link names, and what is no longer there."""
    request: Request = {}
    problems = []
    for name, text in query.items():
        field = fields.get(name)
        if field is None:
            continue
        request[name] = files.find(text) or typed(field, text)
        if field.kind == "uri" and not isinstance(request[name], File):
            del request[name]
            problems.append(Problem(f"{text} was given to an earlier run of this page: choose it again.", name))
    return request, tuple(problems)


def files_of(request: Request) -> list[File]:
    return [value for value in request.values() if isinstance(value, File)]


def _picture_name(request: Request) -> str:
    return f"picture.{request.get('output_format', 'webp')}"


def _in_here_document(value: Any) -> str:
    """JSON as a shell's here-document has it: the shell puts files in, its own signs are escaped in all else."""
    if isinstance(value, File):
        return f"\"data:{value.kind};base64,$(base64 < {value.name} | tr -d '\\n')\""
    text = json.dumps(value, ensure_ascii=False)
    for sign in ("\\", "$", "`"):
        text = text.replace(sign, f"\\{sign}")
    return text


def _text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, bool) else str(value)
