"""From the server's inputs to Gradio's components, and from the components' values to a request and back."""

import re
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from play.fields import PROMPT, Field, typed
from play.files import File, Files
from play.predictions import Request

IMAGE, MASK = "image", "mask"
HERE = Path(__file__).parent
CODE = re.compile("`([^`]*)`")  # in descriptions
FEW = 3  # as many choices stand side by side, more in a list


def component(field: Field, fields: Mapping[str, Field]) -> gr.components.Component:
    """What shows one input, with the server's description, default, bounds and choices."""
    about: dict[str, Any] = {"label": field.label, "info": field.info, "elem_id": f"input-{field.name}"}
    if field.choices:
        kind = gr.Radio if len(field.choices) <= FEW else gr.Dropdown
        return kind(choices=list(field.choices), value=field.default, **about)
    if field.kind == "boolean":
        return gr.Checkbox(value=bool(field.default), **about)
    if field.kind == "uri":
        return _file(field, fields)
    if field.bounded:
        return gr.Slider(field.minimum, field.maximum, value=field.default, step=field.step, **about)
    lines = 6 if field.name == PROMPT else 1
    text = "" if field.default is None else str(field.default)
    return gr.Textbox(value=text, lines=1, max_lines=lines, **about)


def has_painter(fields: Mapping[str, Field]) -> bool:
    """Whether the mask is painted on the picture, and so has no component of its own."""
    return IMAGE in fields and MASK in fields


def _file(field: Field, fields: Mapping[str, Field]) -> gr.components.Component:
    """The picture that a mask may be painted on, with the mask; any other file as it is."""
    if field.name == IMAGE and has_painter(fields):
        return gr.HTML(
            None,
            html_template=_painter(fields[IMAGE], fields[MASK]),
            js_on_load=(HERE / "painter.js").read_text(),
            apply_default_css=False,
            container=True,
            elem_id=f"input-{field.name}",
        )
    return gr.Image(type="filepath", image_mode=None, label=field.label, elem_id=f"input-{field.name}", height=160)


def _painter(image: Field, mask: Field) -> str:
    """The painter's HTML with the server's words. Gradio reads it as a JavaScript template, whose signs are escaped."""
    words = {"TITLE": f"{image.label} and {mask.label.lower()}", "ABOUT": f"{image.info} {mask.info}"}
    html = (HERE / "painter.html").read_text()
    for place, text in words.items():
        shown = CODE.sub(r"<code>\1</code>", escape(text))
        html = html.replace(place, re.sub(r"[`$\\{}]", lambda sign: f"&#{ord(sign.group())};", shown))
    return html


def read_request(fields: Mapping[str, Field], values: Mapping[str, Any], files: Files) -> Request:
    """The inputs that differ from the server's defaults, and the prompt; pictures and chosen LoRAs as `File`."""
    request: Request = {}
    for name, value in values.items():
        field = fields[name]
        if isinstance(value, dict):
            request |= {part: files.add_picture(url, part) for part, url in value.items() if url}
        elif field.kind == "uri" and value:
            request[name] = files.add(Path(value).read_bytes(), Path(value).name)
        elif isinstance(value, str):
            text = value.strip()
            request |= {name: files.find(text) or typed(field, text)} if text else {}
        elif value is not None:
            request[name] = value
    return {name: value for name, value in request.items() if name == PROMPT or value != fields[name].default}


def to_values(fields: Mapping[str, Field], request: Request) -> dict[str, Any]:
    """What the components show for the request; inputs that it leaves out have the server's default."""
    values = {name: _to_value(field, request.get(name, field.default)) for name, field in fields.items()}
    if has_painter(fields):
        parts = {name: file.data_url() for name in (IMAGE, MASK) if (file := request.get(name))}
        values[IMAGE] = parts if IMAGE in parts else None
    return values


def _to_value(field: Field, value: Any) -> Any:
    if isinstance(value, File):
        return str(value.path) if field.kind == "uri" else value.name
    if field.choices or field.kind in ("boolean", "uri") or field.bounded:
        return value
    return "" if value is None else str(value)
