"""Draw a contact sheet with the real predictor: prompts by models and modes, as one PNG and one HTML page."""

import argparse
import base64
import html
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
from PIL import Image, ImageDraw

from demo.scenes import Scene, picture_of
from tools.server import cog_server

PROMPTS = (
    "a red circle on a white background",
    "a large yellow triangle on a blue background",
    "a small white square at the top on a purple background",
    "a black ring on the left on an orange background",
    "a green square on the right on a yellow background",
    "a blue circle at the bottom on a black background",
)
GIVEN = Scene("square", "orange", "green", "medium", "middle")
CELL, MARGIN = 256, 40  # pixels
QUICK = {"megapixels": "0.25", "output_format": "png", "seed": 1}


@dataclass(frozen=True)
class Column:
    title: str
    inputs: dict[str, Any]


def columns() -> list[Column]:
    given, mask = data_url(picture_of(GIVEN, 512, 512)), data_url(given_mask())
    dev, schnell = {"model": "dev"}, {"model": "schnell", "num_inference_steps": 4}
    return [
        Column("dev", dev),
        Column("dev, another seed", dev | {"seed": 2}),
        Column("dev, guidance 0.5", dev | {"guidance_scale": 0.5}),
        Column("schnell, 4 steps", schnell),
        Column("dev, image at 0.8", dev | {"image": given, "prompt_strength": 0.8}),
        Column("dev, image at 0.95", dev | {"image": given, "prompt_strength": 0.95}),
        Column("dev, right half masked", dev | {"image": given, "mask": mask, "prompt_strength": 0.95}),
    ]


def given_mask() -> Image.Image:
    mask = Image.new("L", (512, 512), 0)
    mask.paste(255, (256, 0, 512, 512))
    return mask


def data_url(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def pictures(url: str) -> Iterator[tuple[int, int, Image.Image]]:
    """Row, column, picture."""
    for row, prompt in enumerate(PROMPTS):
        for index, column in enumerate(columns()):
            inputs = QUICK | column.inputs | {"prompt": prompt}
            answer = requests.post(f"{url}/predictions", json={"input": inputs}, timeout=600).json()
            if answer["status"] != "succeeded":
                raise SystemExit(f"{prompt}, {column.title}: {answer['error']}")
            content = base64.b64decode(answer["output"][0].partition(",")[2])
            yield row, index, Image.open(io.BytesIO(content)).resize((CELL, CELL), Image.Resampling.LANCZOS)


def main() -> None:
    parser = argparse.ArgumentParser(prog="script/gallery", description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=Path("output-gallery"), help="the folder to write to")
    folder = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)
    sheet = Image.new("RGB", (len(columns()) * (CELL + 8) + 8, len(PROMPTS) * (CELL + MARGIN) + MARGIN), "white")
    pen = ImageDraw.Draw(sheet)
    for index, column in enumerate(columns()):
        pen.text((8 + index * (CELL + 8), 10), column.title, fill="black", font_size=18)
    with cog_server() as server:
        for row, index, picture in pictures(server.url):
            x, y = 8 + index * (CELL + 8), MARGIN + row * (CELL + MARGIN)
            sheet.paste(picture, (x, y))
            picture.save(folder / f"{row}-{index}.webp", quality=85)
            if index == 0:
                pen.text((x, y + CELL + 8), PROMPTS[row], fill="black", font_size=18)
            print(f"{PROMPTS[row]}, {columns()[index].title}", flush=True)
    sheet.save(folder / "gallery.png")
    (folder / "index.html").write_text(page())
    print(folder / "gallery.png", folder / "index.html")


def page() -> str:
    head = "".join(f"<th>{html.escape(column.title)}</th>" for column in columns())
    rows = []
    for row, prompt in enumerate(PROMPTS):
        cells = "".join(f'<td><img src="{row}-{index}.webp" width="200"></td>' for index in range(len(columns())))
        rows.append(f"<tr><th>{html.escape(prompt)}</th>{cells}</tr>")
    style = "body { font-family: sans-serif } th { font-weight: normal; max-width: 12em }"
    return (
        f"<!doctype html><meta charset='utf-8'><title>flux-lora</title><style>{style}</style>"
        f"<table><tr><th></th>{head}</tr>{''.join(rows)}</table>\n"
    )


if __name__ == "__main__":
    main()
