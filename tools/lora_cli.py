"""Fetch a LoRA into the cache, print its path, and say on standard error what is known of it, trigger words first.

It fills the cache beforehand, or says in one sentence why a reference fails.
"""

import argparse
import logging
import sys
from collections import Counter
from collections.abc import Iterator

from fetch.fetched import FetchedLora
from fetch.references import ACCEPTED
from fetch.sources import fetch_lora
from lora.about import describe
from lora.errors import LoraError
from lora.header import Header, read_header
from lora.layers import ORIGINAL
from lora.names import TRANSFORMER, Names, split_key
from settings import MB, SettingsError, read_settings

BLOCKS = 38  # FLUX.1's single blocks; it has 19 double ones
KINDS = {  # a part of an update -> the kind that has it
    "down": "LoRA",
    "lokr_w1": "LoKr",
    "lokr_w1_a": "LoKr",
    "hada_w1_a": "LoHa",
    "dora_scale": "DoRA",
    "magnitude": "DoRA",
    "diff": "whole differences",
    "diff_b": "biases",
    "set_weight": "whole weights",
}


def main() -> int:
    """Returns the exit code: 0 when the LoRA is there."""
    parser = argparse.ArgumentParser(prog="script/lora", description=__doc__)
    parser.add_argument("reference", metavar="REFERENCE", help=ACCEPTED)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("flux-lora").setLevel(logging.INFO)
    try:
        fetched = fetch_lora(arguments.reference, read_settings())
        print(fetched.path)
        for line in fetched.read(_facts):
            print(line, file=sys.stderr)
    except (LoraError, SettingsError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _facts(fetched: FetchedLora) -> list[str]:
    """One line for each thing that the file says, or that its keys and shapes say."""
    header = read_header(fetched.path, fetched.name)
    about = describe(header)
    parts = Counter(part for part in map(_part, header.entries) if part)
    known = {
        "trigger words": ", ".join(about.trigger_words) or "none are known",
        "title": about.title,
        "author": about.author,
        "licence": about.license,
        "usage hint": about.usage_hint,
        "base model": about.base_model,
        "trained steps": about.steps,
        "written by": _dialect(header),
        "kinds": ", ".join(dict.fromkeys(KINDS[part] for part in parts if part in KINDS)),
        "rank": _ranks(header),
        "layers": len({split_key(key)[0] for key in header.entries if _part(key)}),
        "size": f"{fetched.path.stat().st_size / MB:.1f} MB",
    }
    return [f"{name}: {value}" for name, value in known.items() if value]


def _part(key: str) -> str | None:
    return split_key(key)[1]


def _ranks(header: Header) -> str:
    ranks = sorted({entry.shape[0] for key, entry in header.entries.items() if _part(key) == "down" and entry.shape})
    return " to ".join(map(str, dict.fromkeys([*ranks[:1], *ranks[-1:]])))


def _dialect(header: Header) -> str:
    """Whose names most of the transformer's keys have."""
    names = Names({TRANSFORMER: dict.fromkeys(_layers(), ())}, header.metadata)
    found = Counter(key.dialect for key in map(names.understand, header.entries) if key and key.dialect)
    return found.most_common(1)[0][0] if found else ""


def _layers() -> Iterator[str]:
    """The weights of FLUX.1's layers in diffusers' names; a few more are no matter here."""
    for layers in ORIGINAL.values():
        for layer in layers:
            yield from (f"{layer.format(i)}.weight" for i in range(BLOCKS if "{}" in layer else 1))


if __name__ == "__main__":
    sys.exit(main())
