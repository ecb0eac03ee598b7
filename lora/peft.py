"""The scale of an adapter's updates, as its PEFT configuration gives it.

PEFT writes an adapter_config.json beside the weights; a fetched file carries it in its metadata, under that name.
diffusers writes the configurations of all components into one entry of the metadata.
"""

import logging
import math
import warnings
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import fields
from functools import cached_property
from typing import Any

from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftConfig

from lora.bases import DIFFUSERS_ENTRY, parse_object
from lora.errors import LoraError
from lora.header import CONFIG_FILE, shown
from lora.names import TRANSFORMER, Key
from lora.patterns import PatternError, Patterns

log = logging.getLogger("flux-lora")

CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # the base of such an adapter is not FLUX.1's own


class PeftConfigs:
    """The configurations in a file's metadata. Raises `LoraError` for one that cannot be followed."""

    def __init__(self, metadata: Mapping[str, str], name: str) -> None:
        self._metadata, self._name = metadata, name

    def of(self, key: Key) -> "_Config | None":
        """The configuration with which the layer of this key was trained, where the file has it."""
        if key.dialect == "PEFT" and self._of_adapter:
            return self._of_adapter
        return self._of_components.get(key.layer.component)

    @cached_property
    def _of_adapter(self) -> "_Config | None":
        text = self._metadata.get(CONFIG_FILE)
        if text is None:
            log.info("%s came without an %s: a layer without an alpha has its rank as alpha", self._name, CONFIG_FILE)
            return None
        return _Config(_parse(text, CONFIG_FILE, self._name), self._name)

    @cached_property
    def _of_components(self) -> "dict[str, _Config]":
        entry = _parse(self._metadata.get(DIFFUSERS_ENTRY) or "{}", DIFFUSERS_ENTRY, self._name)
        return {component: _Config(values, self._name) for component, values in _by_component(entry).items()}


class _Config:
    """One configuration, as far as the scale of updates depends on it."""

    def __init__(self, values: Mapping[str, Any], name: str) -> None:
        self._about = f"{name}: its PEFT configuration"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of fields that a newer PEFT added
                config = PeftConfig.from_peft_type(**{"peft_type": "LORA", **values})  # type: ignore[no-untyped-call]
            if not isinstance(config, LoraConfig | LoKrConfig | LoHaConfig):
                raise LoraError(f"{self._about} is for {values.get('peft_type')}, which is not supported.")
            self._read(config)
        except LoraError:
            raise
        except PatternError as error:
            raise LoraError(f"{self._about} is not understood: {error}.") from None
        except (TypeError, ValueError, OverflowError, KeyError, AttributeError, ImportError, RecursionError) as error:
            raise LoraError(f"{self._about} is not understood ({type(error).__name__}).") from None

    def _read(self, config: LoraConfig | LoKrConfig | LoHaConfig) -> None:
        self._rank = float(config.r)
        self._alpha = float(config.lora_alpha if isinstance(config, LoraConfig) else config.alpha)
        self._ranks, self._alphas = Patterns(config.rank_pattern), Patterns(config.alpha_pattern)
        self._rank_stabilised = False
        if not isinstance(config, LoraConfig):
            return
        self._rank_stabilised = bool(config.use_rslora)
        start = config.init_lora_weights
        if isinstance(start, str) and start.lower().startswith(CHANGE_THE_BASE):
            raise LoraError(
                f"{self._about} starts from {shown(start)!r}, which changes the base model as well: save the adapter "
                "with PEFT's path_initial_model_for_weight_conversion."
            )
        variants = [
            one.name for one in fields(config) if one.metadata.get("is_lora_variant") and one.name != "use_dora"
        ]
        used = [variant for variant in (*variants, "layer_replication") if getattr(config, variant)]
        if used or start == "mica":
            raise LoraError(f"{self._about} uses {', '.join(used) or start}, which is not supported.")

    def scale(self, layer: str, rank: int | None, alpha: float | None) -> float:
        """By what the update of a layer is multiplied: alpha / rank, or alpha / sqrt(rank) with rank-stabilised LoRA
        (arXiv:2312.03732).

        `rank` and `alpha` are those of the tensors, None where they have none. Raises `LoraError` where the rank is not
        that of the configuration.
        """
        said = self._ranks.value(layer, self._rank)
        if rank is not None and rank != said:
            raise LoraError(f"{self._about} says rank {said:g} for {layer}, which has {rank}.")
        alpha = self._alphas.value(layer, self._alpha) if alpha is None else alpha
        if not (math.isfinite(alpha) and alpha and 0 < said < math.inf):
            raise LoraError(f"{self._about} says alpha {alpha:g} and rank {said:g} for {layer}.")
        return alpha / (math.sqrt(said) if self._rank_stabilised else said)


def _parse(text: str, what: str, name: str) -> dict[str, Any]:
    values = parse_object(text)
    if values is None:
        raise LoraError(f"{name}: its {what} is not a JSON object.")
    return values


def _by_component(entry: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """diffusers puts "<component>." before each field, except where it saved the transformer alone."""
    found: dict[str, dict[str, Any]] = defaultdict(dict)
    for field, value in entry.items():
        component, dot, rest = field.rpartition(".")
        found[component if dot else TRANSFORMER][rest if dot else field] = value
    return found
