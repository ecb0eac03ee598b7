"""Kinds of adapter that are known and not supported, told from the names of their tensors."""

import re

# PEFT's, by what the names of their tensors begin with (peft/mapping.py).
_TUNERS = {
    "adamss": "AdaMSS",
    "adaption_prompt": "adaption prompt",
    "beft": "BEFT",
    "bone": "Bone",
    "c3a": "C3A",
    "cartridge": "Cartridge",
    "cpt": "CPT",
    "deft": "DEFT",
    "delora": "DeLoRA",
    "fourierft": "FourierFT",
    "frod": "FRoD",
    "gralora": "GraLoRA",
    "hira": "HiRA",
    "hra": "HRA",
    "ia3": "IA3",
    "lily": "Lily",
    "ln_tuning": "LN tuning",
    "miss": "MiSS",
    "multitask_prompt_tuning": "multitask prompt tuning",
    "osf": "OSF",
    "p_tuning": "P tuning",
    "peanut": "PEANuT",
    "poly": "Poly",
    "prefix_tuning": "prefix tuning",
    "prompt_tuning": "prompt tuning",
    "psoft": "PSOFT",
    "pvera": "PVeRA",
    "randlora": "RandLoRA",
    "road": "RoAd",
    "shadow": "Shadow",
    "shira": "SHiRA",
    "supertuning": "Supertuning",
    "tinylora": "TinyLoRA",
    "trainable_tokens": "trainable tokens",
    "unilora": "Uni-LoRA",
    "vblora": "VB-LoRA",
    "vera": "VeRA",
    "waveft": "WaveFT",
    "xlora": "X-LoRA",
    "prompt": "prompt",
}
_TUNER = re.compile(rf"(?:^|\.)(?:internal_)?({'|'.join(_TUNERS)})_")
_OTHERS = (
    ("an OFT or BOFT adapter", re.compile(r"\.b?oft_")),
    ("a GLoRA adapter", re.compile(r"\.[ab][12]\.weight$|\.glora_")),
    ("an AdaLoRA adapter", re.compile(r"\.lora_E$")),
    ("a SingLoRA adapter", re.compile(r"\.lora_training_steps$")),
    ("a LyCORIS adapter of the kind IA3", re.compile(r"\.on_input$")),
    ("a LyCORIS adapter of the kind T-LoRA", re.compile(r"\.lambda_layer$")),
    ("an EasyControl LoRA", re.compile(r"\.(q|k|v|proj)_loras\.\d+\.")),
)


def unsupported_kind(key: str) -> str | None:
    """What only a file with such a key can be; None for a key that no unsupported kind has."""
    if tuner := _TUNER.search(key):
        return f"an adapter of PEFT's kind {_TUNERS[tuner[1]]}"
    return next((kind for kind, pattern in _OTHERS if pattern.search(key)), None)
