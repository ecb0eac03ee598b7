"""Environment variables: typed, with errors that name the variable and never show a token."""

from pathlib import Path

import pytest
import torch

from flux.device import choose_device
from settings import SettingsError, read_settings


def test_defaults_serve() -> None:
    settings = read_settings({})
    assert settings.flux_dev is None
    assert settings.flux_demo
    assert settings.go_fast_lora_multiplier == 1.5
    assert settings.go_fast_cache_threshold is None
    assert settings.lora_cache_dir == Path.home() / ".cache" / "flux-lora"
    assert not settings.lora_allow_private_hosts
    assert settings.safety_model is None
    assert (settings.safety_concept_limit, settings.safety_vit_limit, settings.safety_open_nsfw_limit) == (0, 0.5, 0.8)
    assert settings.safety_timeout == 30
    assert not settings.safety_check_inputs


def test_values_are_typed() -> None:
    settings = read_settings(
        {
            "FLUX_DEV": " /models/dev ",
            "FLUX_COMPILE": "off",
            "LORA_MAX_GB": "0.5",
            "LORA_CACHE_DIR": "~/loras",
            "LORA_ALLOW_PRIVATE_HOSTS": "1",
            "CIVITAI_ENDPOINT": "http://127.0.0.1:8000/",
        }
    )
    assert settings.flux_dev == "/models/dev"
    assert settings.flux_compile is False
    assert settings.lora_max_bytes == 500_000_000
    assert settings.lora_cache_dir == Path.home() / "loras"
    assert settings.lora_allow_private_hosts
    assert settings.civitai_endpoint == "http://127.0.0.1:8000"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("FLUX_DEV", ""),
        ("FLUX_SCHNELL", "  "),
        ("FLUX_DEMO", "never"),
        ("FLUX_DEVICE", "gpu"),
        ("FLUX_COMPILE", "maybe"),
        ("GO_FAST_LORA_MULTIPLIER", "0"),
        ("GO_FAST_CACHE_THRESHOLD", "-1"),
        ("LORA_CACHE_DIR", ""),
        ("LORA_CACHE_GB", "-1"),
        ("LORA_RAM_GB", "inf"),
        ("LORA_MAX_GB", "five"),
        ("LORA_ALLOW_PRIVATE_HOSTS", "2"),
        ("CIVITAI_ENDPOINT", "civitai.com"),
        ("REPLICATE_ENDPOINT", "ftp://replicate.com"),
        ("HF_ENDPOINT", "http://example.com:65536"),
        ("HF_ENDPOINT", "http://[::1"),
        ("SAFETY_MODEL", ""),
        ("SAFETY_MODEL", "none"),
        ("SAFETY_VIT", ""),
        ("SAFETY_VIT_LIMIT", "1.5"),
        ("SAFETY_OPEN_NSFW_LIMIT", "nan"),
        ("SAFETY_CONCEPT_LIMIT", "strict"),
        ("SAFETY_TIMEOUT", "0"),
        ("SAFETY_CHECK_INPUTS", "2"),
        ("INPUTS_AS_DATA_ONLY", "only"),
        ("REQUEST_TIMEOUT", "-1"),
        ("INPUT_TIMEOUT", "nan"),
        ("HF_TOKEN", "hf_a\nb"),
        ("CIVITAI_API_TOKEN", "a b"),
        ("REPLICATE_API_TOKEN", "a\tb"),
    ],
)
def test_a_value_that_cannot_be_used_is_one_sentence_that_names_its_variable(name: str, value: str) -> None:
    with pytest.raises(SettingsError) as caught:
        read_settings({name: value})
    message = str(caught.value)
    assert message.startswith(f"The environment variable {name} ")
    assert message.endswith(".")
    assert "\n" not in message


def test_tokens_are_never_shown() -> None:
    tokens = {"HF_TOKEN": "hf_secret", "CIVITAI_API_TOKEN": "civitai_secret", "REPLICATE_API_TOKEN": "r8_secret"}
    settings = read_settings(tokens)
    assert settings.hf_token == "hf_secret"
    assert "secret" not in repr(settings)
    with pytest.raises(SettingsError) as caught:
        read_settings({"HF_TOKEN": "hf_secret \n x"})
    assert "secret" not in str(caught.value)


def test_a_blank_token_is_no_token() -> None:
    assert read_settings({"HF_TOKEN": ""}).hf_token is None


def test_the_device_is_the_cpu_where_there_is_no_gpu() -> None:
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert choose_device(None).type == expected


def test_a_gpu_that_is_not_there_is_named() -> None:
    with pytest.raises(SettingsError, match="FLUX_DEVICE asks for cuda:99"):
        choose_device("cuda:99")
