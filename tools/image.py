"""Draw a picture with what the container's image would hold: its files alone, on the Python that runs this."""

import base64
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from settings import MB
from tools import ROOT
from tools.image_files import image_files
from tools.server import Project, ServerError, cog_server

DEMO = {  # beside cog.yaml's, which ask for a GPU and for the real weights
    "FLUX_DEV": "weights/demo-dev",
    "FLUX_SCHNELL": "weights/demo-schnell",
    "FLUX_DEVICE": "cpu",
    "SAFETY_MODEL": "open-nsfw",
    "LORA_FOLDER": "weights/demo-loras",
}
LARGE_BYTES = 100 * MB  # of the real weights, which may be there


def main() -> int:
    """Returns the exit code: 0 when the picture was drawn."""
    with TemporaryDirectory(prefix="flux-lora-image-") as folder:
        files = image_files()
        for file in files:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / file).stat().st_size > LARGE_BYTES:
                (folder / file).symlink_to(ROOT / file)
            else:
                shutil.copyfile(ROOT / file, folder / file, follow_symlinks=False)  # a link stays one, as Docker has it
        try:
            with cog_server({**DEMO, "PYTHONPATH": ""}, on_log=_print, project=Project(Path(folder))) as server:
                answer = server.predict(_inputs())
        except ServerError as error:
            _print(f"server error: {error}")
            return 1
    if answer["status"] != "succeeded":
        _print(answer["error"])
        return 1
    _print(f"A picture was drawn with {len(files)} files on Python {sys.version.split()[0]}.")
    return 0


def _inputs() -> dict[str, object]:
    """A request that takes the way through as many modules as one can."""
    picture, mask = (
        "data:image/png;base64," + base64.b64encode((ROOT / "docs" / name).read_bytes()).decode()
        for name in ("input.png", "mask.png")
    )
    words = {"prompt": "a blue circle on a white background, in the style of TOK", "image": picture, "mask": mask}
    return {**words, "go_fast": True, "num_inference_steps": 2, "replicate_weights": "sunset.safetensors"}


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
