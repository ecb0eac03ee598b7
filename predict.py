"""The predictor that Cog serves: what it takes, and the way of one request from its inputs to its pictures."""

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from cog import BaseRunner, Input, Path
from PIL import Image
from tqdm import tqdm

from fetch.pictures import fetch_inputs, take_as_sent
from flux.checkpoints import find_checkpoints, is_demo
from flux.device import check_device, choose_device, compiles, compute_dtype, memory_of, synchronize
from flux.models import FP8, Flux, cache_blocks, compile_blocks, fill_device, fits, load_flux, residency_of
from flux.pipelines import Job, NotFiniteError, decode, denoise, encode_picture, encode_prompt, steps_to_run, warm_up
from flux.residency import DeviceMemoryError
from guards import Guards
from images import Inputs, OutputFolders, Size, keep_unmasked, read_inputs, save_pictures
from lora.errors import LoraError
from lora_loader import ActiveLora, LoraLoader, blamed_on, slowest_origin, trigger_words
from phases import Phases
from safety import BlockedError, SafetyError, load_screener
from service.errors import InputError, explained
from service.hints import log_hints, reported_seed, request_hints, trigger_hint, usable_seed
from settings import read_settings

log = logging.getLogger("flux-lora")
log.setLevel(logging.INFO)
logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)  # for the libraries

METRIC_PHASES = ("lora_fetch", "lora_read", "load", "lora_apply", "encode", "denoise", "decode", "safety", "save")
FORESEEN = (InputError, LoraError, BlockedError, SafetyError, DeviceMemoryError, NotFiniteError)  # they are sentences
INPUT_SAFETY = "safety of the input"  # counted in safety_time


@dataclass(frozen=True)
class Request:
    """What is to be drawn, checked and read; the LoRAs come apart from it."""

    prompt: str
    inputs: Inputs
    steps: int
    guidance_scale: float
    prompt_strength: float
    seeds: range


class Predictor(BaseRunner):
    """FLUX.1 dev and schnell with up to two LoRAs. Cog's static schema generator reads the signature of `run`: inputs,
    defaults and bounds there are literals, each description is one plain string."""

    def setup(self, weights: Path | None = None) -> None:
        """Load both models; everything that can be wrong with the environment is an error here, of one sentence."""
        take_as_sent(Predictor.run, "image", "mask")
        self.settings = read_settings()
        self.device = choose_device(self.settings.flux_device)
        phases = Phases(partial(synchronize, self.device))
        with phases.time("load safety checker"):
            self.screener = load_screener(self.settings, self.device)
        with phases.time("find weights"):
            folders = find_checkpoints(self.settings)
        with phases.time("load models"):
            self.models = load_flux(folders, self.device, compute_dtype(self.device), memory_of(self.device))
            fill_device(self.models)
        self.loras = LoraLoader(self.models, self.settings)
        if weights:
            with phases.time("load own LoRA"):
                self.loras.load_own(str(weights))
        if self.settings.go_fast_cache_threshold is not None:
            cache_blocks(self.models, self.settings.go_fast_cache_threshold)
        if compiles(self.settings.flux_compile, self.device):
            with phases.time("compile"):
                compile_blocks(self.models)
                warm_up(self.models)
        phases.report()
        self.demos = {name for name, folder in folders.items() if is_demo(folder)}
        self.output_folders = OutputFolders()
        self.guards = Guards(self.settings)

    def run(  # noqa: PLR0913, PLR0917 - the contract has 21 inputs
        self,
        prompt: str = Input(
            description="What to draw. With a LoRA, its trigger word activates the trained subject or style."
        ),
        image: Path | None = Input(
            description="Input image for image-to-image, or with `mask` for inpainting. The output follows its shape, and aspect_ratio, width, height and megapixels are ignored.",
            default=None,
        ),
        mask: Path | None = Input(
            description="Mask for inpainting: white is repainted, black is kept. Needs `image`; resized to it.",
            default=None,
        ),
        aspect_ratio: str = Input(
            description="Shape of the output. `custom` uses width and height, and runs in bf16.",
            choices=["1:1", "16:9", "21:9", "3:2", "2:3", "4:5", "5:4", "3:4", "4:3", "9:16", "9:21", "custom"],
            default="1:1",
        ),
        height: int | None = Input(
            description="Height in pixels, only with aspect_ratio `custom`; rounded to the nearest multiple of 16. Not available in fast mode.",
            ge=256,
            le=1440,
            default=None,
        ),
        width: int | None = Input(
            description="Width in pixels, only with aspect_ratio `custom`; rounded to the nearest multiple of 16. Not available in fast mode.",
            ge=256,
            le=1440,
            default=None,
        ),
        prompt_strength: float = Input(
            description="For image-to-image and inpainting: 1.0 destroys the information in the input image entirely, 0 returns it unchanged.",
            ge=0,
            le=1,
            default=0.8,
        ),
        model: str = Input(
            description="Which FLUX.1 to run. dev is at its best near 28 steps, schnell needs only 4.",
            choices=["dev", "schnell"],
            default="dev",
        ),
        num_outputs: int = Input(
            description="How many pictures to make. Picture i is the one that seed + i gives alone.",
            ge=1,
            le=4,
            default=1,
        ),
        num_inference_steps: int = Input(
            description="Number of denoising steps: near 28 for dev, 4 for schnell. Fewer are faster and rougher.",
            ge=1,
            le=50,
            default=28,
        ),
        guidance_scale: float = Input(
            description="How closely dev follows the prompt. Lower is more realistic. schnell has no guidance.",
            ge=0,
            le=10,
            default=3,
        ),
        seed: int | None = Input(
            description="Seed for reproducible generation. Without one a random seed is chosen and reported.",
            default=None,
        ),
        output_format: str = Input(
            description="File format of the output pictures.",
            choices=["webp", "jpg", "png"],
            default="webp",
        ),
        output_quality: int = Input(
            description="Quality of webp and jpg from 0 to 100, best at 100. Ignored for png.",
            ge=0,
            le=100,
            default=80,
        ),
        disable_safety_checker: bool = Input(
            description="Return the pictures without screening them.",
            default=False,
        ),
        go_fast: bool = Input(
            description="Run faster predictions on the fp8-quantized model; off, the original bf16.",
            default=False,
        ),
        megapixels: str = Input(
            description="Approximate number of megapixels of the output.",
            choices=["1", "0.25"],
            default="1",
        ),
        replicate_weights: str | None = Input(
            description="LoRA to use: a Replicate model `<owner>/<name>` or `<owner>/<name>/<version>`, `huggingface.co/<owner>/<name>`, `civitai.com/models/<id>`, or the URL of a .safetensors file. Example: fofr/flux-pixar-cars",
            default=None,
        ),
        lora_scale: float = Input(
            description="Strength of the main LoRA. Between 0 and 1 is usual; under go_fast it is multiplied by 1.5.",
            ge=-1,
            le=3,
            default=1,
        ),
        extra_lora: str | None = Input(
            description="A second LoRA to use with or without the first, named in the same ways.",
            default=None,
        ),
        extra_lora_scale: float = Input(
            description="Strength of the second LoRA. Between 0 and 1 is usual; under go_fast it is multiplied by 1.5.",
            ge=-1,
            le=3,
            default=1,
        ),
    ) -> list[Path]:
        """Draw the pictures of one request, one after another."""
        with self.guards.request(), explained(*FORESEEN):
            # JSON's 28.0 is an integer to the schema and a float to Python
            num_outputs, steps, quality = int(num_outputs), int(num_inference_steps), int(output_quality)
            seed = usable_seed(seed, num_outputs)
            phases = Phases(partial(synchronize, self.device))
            residency_of(self.models).phases = phases
            with phases.time("read"):
                inputs = read_inputs(*fetch_inputs(image, mask, self.settings), aspect_ratio, megapixels, width, height)
            custom = aspect_ratio == "custom" and inputs.picture is None
            flux = self._choose(model, inputs.size, fast=go_fast, custom=custom)
            factor = self.settings.go_fast_lora_multiplier if go_fast and flux.precision == FP8 else 1.0
            loras = self.loras.load(
                model, (replicate_weights, lora_scale * factor), (extra_lora, extra_lora_scale * factor), phases
            )
            log.info("%s, %s, %d x %d, seed %d", model, inputs.mode, *inputs.size, seed)
            to_run = steps_to_run(steps, prompt_strength)
            log_hints(
                *request_hints(model, inputs.mode, steps, to_run, guidance_scale, prompt_strength),
                trigger_hint(trigger_words(loras), prompt),
            )
            judged = inputs.picture if self.settings.safety_check_inputs and not disable_safety_checker else None
            if judged and not self._screen([judged], phases, INPUT_SAFETY):
                raise BlockedError("The safety checker blocked the input image: send another one.")
            if inputs.picture is not None and to_run == 0:
                pictures = [inputs.picture] * num_outputs
            else:
                seeds = range(seed, seed + num_outputs)
                request = Request(prompt, inputs, steps, guidance_scale, prompt_strength, seeds)
                pictures = flux.residency.or_clear(lambda: self._draw(flux, loras, request, phases))
            shown = pictures if disable_safety_checker else self._screen(pictures, phases)
            with phases.time("save"):
                paths = save_pictures(shown, self.output_folders.fresh(), output_format, quality)
            phases.report()
            self._record_metrics(seed, inputs, flux, len(pictures) - len(shown), loras, phases)
            if not shown:
                raise BlockedError("The safety checker blocked every picture: try another prompt or another seed.")
            return [Path(path) for path in paths]

    def healthcheck(self) -> bool:
        """Cog calls this, on a thread of its own, when it is asked for its health; what it raises is the answer."""
        check_device(self.device)
        self.screener.check_health()
        return True

    def _draw(self, flux: Flux, loras: Sequence[ActiveLora], request: Request, phases: Phases) -> list[Image.Image]:
        """One picture a seed, with one progress bar over the denoising steps of all of them."""
        inputs = request.inputs
        with phases.time("lora_apply"):
            encoders = self.loras.apply(flux, loras)
        with phases.time("encode"):
            job = Job(
                size=inputs.size,
                steps=request.steps,
                guidance=request.guidance_scale,
                embeds=encode_prompt(flux, request.prompt, encoders),
                strength=request.prompt_strength,
                posterior=encode_picture(flux, inputs.picture) if inputs.picture else None,
                mask=inputs.mask,
            )
        phases.report()
        pictures = []
        with tqdm(total=len(request.seeds) * job.steps_to_run, desc="denoising") as bar:
            for seed in request.seeds:
                with phases.time("denoise"):
                    latents = denoise(flux, job, seed, bar.update)
                with phases.time("decode"), blamed_on(loras):
                    picture = decode(flux, latents, job.size)
                if inputs.picture and inputs.mask:
                    picture = keep_unmasked(picture, inputs.picture, inputs.mask)
                pictures.append(picture)
        return pictures

    def _screen(self, pictures: list[Image.Image], phases: Phases, phase: str = "safety") -> list[Image.Image]:
        with phases.time(phase):
            return residency_of(self.models).or_clear(lambda: self.screener.allowed(pictures))

    def _choose(self, model: str, size: Size, *, fast: bool, custom: bool) -> Flux:
        """The model in the precision that was asked for; nothing is done otherwise without a line in the log."""
        if model in self.demos:
            log.warning(
                "%s is the demo model: it draws one plain shape, such as a red circle on a white background", model
            )
        flux = self.models[model]
        if fast and not custom:
            return flux.fast
        if not fits(flux.exact, size):
            log.warning("the GPU's memory cannot hold %s in %s: it runs in fp8", model, flux.exact.precision)
            return flux.fast
        if fast:
            log.warning("go_fast: custom sizes run in %s", flux.exact.precision)
        return flux.exact

    def _record_metrics(
        self, seed: int, inputs: Inputs, flux: Flux, blocked: int, loras: Sequence[ActiveLora], phases: Phases
    ) -> None:
        metrics: dict[str, int | float | str] = {
            "seed": reported_seed(seed),
            "mode": inputs.mode,
            "precision": flux.precision,
            "width": inputs.size[0],
            "height": inputs.size[1],
            "lora_cache": slowest_origin(loras),
            "lora_trigger_words": ", ".join(trigger_words(loras)),
            "images_blocked": blocked,
        }
        seconds = {name: phases.seconds.get(name, 0.0) for name in METRIC_PHASES}
        seconds["safety"] += phases.seconds.get(INPUT_SAFETY, 0.0)
        for name, value in (metrics | {f"{name}_time": value for name, value in seconds.items()}).items():
            self.record_metric(name, value)
