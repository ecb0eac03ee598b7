"""A 1 megapixel request through the real server: every part outside encoding, denoising, decoding and screening."""

import base64
import io
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import requests
from PIL import Image

from bench._common import table
from tools.random_flux import FluxSize, write_random_flux
from tools.server import cog_server

ROUNDS = 15
GOAL = 1.5
MODEL_PHASES = ("encode_time", "denoise_time", "decode_time", "safety_time")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        environment = {}
        for model in ("dev", "schnell"):
            write_random_flux(Path(folder) / model, FluxSize(), model=model)
            environment[f"FLUX_{model.upper()}"] = str(Path(folder) / model)
        with cog_server(environment) as server:
            rows = measure(server.url)
    table(["part (ms, median)", "text-to-image", "image-to-image, WebP", "image-to-image, PNG"], rows)


def measure(url: str) -> list[list[str]]:
    request = {"prompt": "a red circle", "num_inference_steps": 1, "seed": 1, "disable_safety_checker": True}
    png, webp = (predict(url, {**request, "output_format": kind})["output"][0] for kind in ("png", "webp"))
    picture = Image.open(io.BytesIO(base64.b64decode(png.partition(",")[2])))
    print(f"The picture is noise, the worst case of every codec: PNG {len(png) >> 10} KB, WebP {len(webp) >> 10} KB.")
    image_to_image = [{**request, "image": data_url, "prompt_strength": 1.0} for data_url in (webp, png)]
    columns = []
    for inputs in [request, *image_to_image]:
        parts: dict[str, list[float]] = {}
        for _ in range(ROUNDS):
            for name, value in {**one_request(url, inputs), "bare webp encode": webp_encode(picture)}.items():
                parts.setdefault(name, []).append(1000 * value)
        columns.append({name: statistics.median(values) for name, values in parts.items()})
        columns[-1]["ratio"] = columns[-1]["all outside the model"] / columns[-1]["bare webp encode"]
    rows = [[name, *(f"{column[name]:.1f}" for column in columns)] for name in columns[0] if name != "ratio"]
    return [*rows, [f"ratio (goal: at most {GOAL})", *(f"{column['ratio']:.2f}" for column in columns)]]


def one_request(url: str, inputs: dict[str, Any]) -> dict[str, float]:
    """Seconds by part, from the client's clock, the metrics and the log."""
    time.sleep(0.05)  # coglet frees its one slot a moment after it has answered
    started = time.perf_counter()
    answer = predict(url, inputs)
    wall = time.perf_counter() - started
    metrics = answer["metrics"]
    model = sum(metrics[phase] for phase in MODEL_PHASES)
    read = next(float(line.split()[1]) for line in answer["logs"].splitlines() if line.startswith("read: "))
    in_run = metrics["predict_time"] - model - read - metrics["save_time"]
    return {
        "reading inputs": read,
        "saving (webp)": metrics["save_time"],
        "rest of run() and Cog's fetching of inputs": in_run,
        "HTTP, JSON, base64, coglet, client": wall - metrics["predict_time"],
        "all outside the model": wall - model,
    }


def predict(url: str, inputs: dict[str, Any]) -> dict[str, Any]:
    answer: dict[str, Any] = requests.post(f"{url}/predictions", json={"input": inputs}, timeout=120).json()
    return answer


def webp_encode(picture: Image.Image) -> float:
    started = time.perf_counter()
    picture.save(io.BytesIO(), "WEBP", quality=80)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
