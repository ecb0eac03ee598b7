"""A predictor without models, on which Cog's server starts in half a second: for tests of what stands around a model.

What it has is the predictor's own: the guards, the sentences of errors, reading pictures, fetching LoRAs, saving.
"""

import time
from typing import Any

from cog import BaseRunner, Path
from PIL import Image

from fetch.pictures import fetch_inputs, take_as_sent
from fetch.sources import fetch_lora
from guards import Guards
from images import OutputFolders, read_inputs, save_pictures
from lora.errors import LoraError
from service.errors import InputError, explained
from settings import read_settings


class Predictor(BaseRunner):
    """Takes the contract's inputs. The input picture is the output, and a prompt such as `2` makes it take 2 s."""

    def setup(self) -> None:
        take_as_sent(Predictor.run, "image")
        self.settings = read_settings()
        self.output_folders = OutputFolders()
        self.guards = Guards(self.settings)

    def run(
        self,
        prompt: str,
        image: Path | None = None,
        num_outputs: int = 1,
        replicate_weights: str | None = None,
        extra_lora: str | None = None,
        **_: Any,
    ) -> list[Path]:
        with self.guards.request(), explained(InputError, LoraError):
            inputs = read_inputs(*fetch_inputs(image, None, self.settings), "1:1", "0.25", None, None)
            for reference in filter(None, (replicate_weights, extra_lora)):
                fetch_lora(reference, self.settings)
            if prompt.isdecimal():
                time.sleep(int(prompt))
            picture = inputs.picture or Image.new("RGB", inputs.size)
            saved = save_pictures([picture] * num_outputs, self.output_folders.fresh(), "png", 80)
            return [Path(path) for path in saved]
