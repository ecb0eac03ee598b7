"""Draw tables of pictures with the real predictor, as a PNG and an HTML page: prompts by modes and LoRA strengths."""

import argparse
import base64
import html
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from demo.scenes import Scene, picture_of
from play.sheet import CELL, contact_sheet, stacked
from published import WEIGHTS
from tools.predict_cli import data_url
from tools.server import CogServer, cog_server

PROMPTS = (
    "a red circle on a white background",
    "a large yellow triangle on a blue background",
    "a small white square at the top on a purple background",
    "a black ring on the left on an orange background",
    "a green square on the right on a yellow background",
    "a large orange ring at the bottom on a black background",
)
STRENGTHS = (-1.0, -0.5, 0.0, 0.5, 1.0, 1.5)
GIVEN = Scene("square", "orange", "green", "medium", "middle")
QUICK = {"megapixels": "0.25", "output_format": "png", "seed": 1}

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Grid:
    """A table of requests."""

    titles: list[str]  # of the columns
    rows: dict[str, list[Inputs]]  # by the label of the row


def modes() -> Grid:
    given, mask = png_url(picture_of(GIVEN, 512, 512)), png_url(given_mask())
    columns: dict[str, Inputs] = {
        "dev": {},
        "dev, another seed": {"seed": 2},
        "dev, go_fast": {"go_fast": True},
        "dev, guidance 1": {"guidance_scale": 1},
        "dev, guidance 0": {"guidance_scale": 0},
        "schnell, 4 steps": {"model": "schnell", "num_inference_steps": 4},
        "dev, image at 0.5": {"image": given, "prompt_strength": 0.5},
        "dev, image at 0.95": {"image": given, "prompt_strength": 0.95},
        "dev, right half masked": {"image": given, "mask": mask, "prompt_strength": 0.95},
    }
    rows = {prompt: [{"prompt": prompt, **inputs} for inputs in columns.values()] for prompt in PROMPTS}
    return Grid(list(columns), rows)


def loras() -> Grid:
    """One LoRA at a time at each strength, the style with its trigger word and without, and both at once."""
    sunset, pastel = (data_url(WEIGHTS / "demo-loras" / f"{name}.safetensors") for name in ("sunset", "pastel"))
    prompt = "a large blue circle on a white background"

    def strengths(prompt: str, **fixed: Any) -> list[Inputs]:
        return [{"prompt": prompt, **fixed, "lora_scale": scale} for scale in STRENGTHS]

    both = {"replicate_weights": sunset, "extra_lora": pastel}
    rows = {
        f"{prompt}, in the style of TOK: sunset": strengths(f"{prompt} TOK", replicate_weights=sunset),
        f"{prompt}: sunset without its trigger word": strengths(prompt, replicate_weights=sunset),
        f"{prompt}: pastel": strengths(prompt, replicate_weights=pastel),
        f"{prompt}, in the style of TOK: sunset, and pastel at 1": strengths(f"{prompt} TOK", **both),
    }
    return Grid([f"strength {scale:g}" for scale in STRENGTHS], rows)


def given_mask() -> Image.Image:
    mask = Image.new("L", (512, 512), 0)
    mask.paste(255, (256, 0, 512, 512))
    return mask


def png_url(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def draw(server: CogServer, inputs: Inputs) -> Image.Image:
    answer = server.predict(QUICK | inputs)
    if answer["status"] != "succeeded":
        raise SystemExit(f"{inputs['prompt']}: {answer['error']}")
    content = base64.b64decode(answer["output"][0].partition(",")[2])
    return Image.open(io.BytesIO(content)).resize((CELL, CELL), Image.Resampling.LANCZOS)


def table_of(grid: Grid, pictures: list[list[Image.Image]]) -> str:
    """The grid as an HTML table that contains the pictures."""
    lines = ["<tr><th></th>", *(f"<th>{html.escape(title)}</th>" for title in grid.titles), "</tr>"]
    for label, several in zip(grid.rows, pictures, strict=True):
        cells = (f'<td><img src="{png_url(picture)}" width="{CELL}"></td>' for picture in several)
        lines += [f"<tr><th>{html.escape(label)}</th>", *cells, "</tr>"]
    return f"<table>{''.join(lines)}</table>"


def main() -> None:
    parser = argparse.ArgumentParser(prog="script/gallery", description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=Path("output-gallery"), help="the folder to write to")
    folder = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)
    sheets, tables = [], []
    with cog_server() as server:
        for grid in (modes(), loras()):
            pictures = []
            for label, several in grid.rows.items():
                print(label, flush=True)
                pictures.append([draw(server, inputs) for inputs in several])
            sheets.append(contact_sheet(grid.titles, dict(zip(grid.rows, pictures, strict=True))))
            tables.append(table_of(grid, pictures))
    stacked(sheets).save(folder / "gallery.png")
    style = "body { font-family: sans-serif } th { font-weight: normal; max-width: 12em }"
    head = f"<!doctype html><meta charset='utf-8'><title>flux-lora</title><style>{style}</style>"
    (folder / "index.html").write_text(head + "".join(tables) + "\n")
    print(folder / "gallery.png", folder / "index.html")


if __name__ == "__main__":
    main()
