"""What a LoRA file says about itself, as the programs write it that people train with."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora.about import MOST_CHARACTERS, MOST_WORDS, About, describe
from lora.header import read_header
from tests.lora_files import LoraFile

KOHYA = {
    "modelspec.architecture": "flux-1-dev/lora",
    "modelspec.title": "my-cat",
    "modelspec.author": "Acme",
    "modelspec.license": "None",
    "ss_base_model_version": "flux1",
    "ss_output_name": "my_cat",
    "ss_steps": "1600",
    "ss_dataset_dirs": json.dumps({"10_ohwx cat": {"n_repeats": 10, "img_count": 20}, "1_reg": {"img_count": 5}}),
    "ss_tag_frequency": json.dumps({"10_ohwx cat": {"sitting": 4, "a photo": 19, "ohwx cat": 20, "grass": 17}}),
}
AI_TOOLKIT = {
    "name": "my_cat",
    "software": json.dumps({"name": "ai-toolkit", "repo": "https://github.com/ostris/ai-toolkit", "version": "0.1.0"}),
    "ss_base_model_version": "flux.1",
    "ss_output_name": "my_cat",
    "ss_tag_frequency": json.dumps({"1_TOK": {"TOK": 1}}),
    "training_info": json.dumps({"step": 1000, "epoch": 62}),
}
SIMPLE_TUNER = {
    "modelspec.architecture": "flux-dev/lora",
    "modelspec.title": "run-1",
    "trained_words": "ohwx cat, sks style, ohwx cat",
    "ss_tag_frequency": json.dumps({"dataset": {"a photo": 30, "ohwx cat": 30}}),
    "global_step": "500",
}


IN_KOHYA = About(("ohwx cat", "a photo"), "flux-1-dev/lora", "my-cat", "Acme", steps=1600)
IN_AI_TOOLKIT = About(("TOK",), "flux.1", "my_cat", steps=1000)
WORDS = ("a cat in", "the style")


@pytest.mark.parametrize(
    ("metadata", "about"),
    [
        ({}, About()),
        (KOHYA, IN_KOHYA),
        ({**KOHYA, "modelspec.trigger_phrase": "a cat in \nthe style"}, replace(IN_KOHYA, trigger_words=WORDS)),
        (AI_TOOLKIT, IN_AI_TOOLKIT),
        ({**AI_TOOLKIT, "ss_base_model_version": "sd_1.5"}, replace(IN_AI_TOOLKIT, base_model=None)),
        (SIMPLE_TUNER, About(("ohwx cat", "sks style"), "flux-dev/lora", "run-1", steps=500)),
        ({"modelspec.usage_hint": "Use the word TOK"}, About(usage_hint="Use the word TOK")),
        ({"adapter_config.json": json.dumps({"base_model_name_or_path": "a/b"})}, About(base_model="a/b")),
        ({"ss_sd_model_name": "flux1-dev.safetensors"}, About(base_model="flux1-dev.safetensors")),
        ({"ss_tag_frequency": json.dumps({"1_x": {"a long caption": 1, "of one picture": 1}})}, About()),
    ],
)
def test_what_programs_write_is_found(metadata: dict[str, str], about: About, tmp_path: Path) -> None:
    assert described(metadata, tmp_path) == about


FIELDS = st.text(max_size=9) | st.sampled_from(["img_count", "step", "1_a"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9) | st.just("img_count"), inner, max_size=3)
    ),
    max_leaves=9,
)
ENTRIES = sorted({*KOHYA, *AI_TOOLKIT, *SIMPLE_TUNER, "adapter_config.json", "modelspec.trigger_phrase"})
VALUES = JSON.map(json.dumps) | st.text() | st.sampled_from(["[" * 9999, "\x1b[2J\n" * 99, "word, " * 999])


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(metadata=st.dictionaries(st.sampled_from(ENTRIES), VALUES, max_size=5))
def test_a_strangers_metadata_makes_short_printable_texts(metadata: dict[str, str], tmp_path: Path) -> None:
    about = described(metadata, tmp_path)
    assert len(about.trigger_words) <= MOST_WORDS
    texts: list[Any] = [about.base_model, about.title, about.author, about.license, about.usage_hint]
    for text in [*about.trigger_words, *(text for text in texts if text is not None)]:
        assert text.isprintable()
        assert 0 < len(text) <= MOST_CHARACTERS


def described(metadata: dict[str, str], folder: Path) -> About:
    path = LoraFile({"lora_unet_x.alpha": torch.zeros(1)}, metadata).save(folder / "lora.safetensors")
    return describe(read_header(path, "it"))
