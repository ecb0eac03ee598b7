"""Fetch a LoRA into the cache and print its path: to fill the cache beforehand, or to see why a reference fails."""

import argparse
import logging
import sys

from fetch.references import ACCEPTED
from fetch.sources import fetch_lora
from lora.errors import LoraError
from settings import SettingsError, read_settings


def main() -> int:
    """Returns the exit code: 0 when the LoRA is there."""
    parser = argparse.ArgumentParser(prog="script/lora", description=__doc__)
    parser.add_argument("reference", metavar="REFERENCE", help=ACCEPTED)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("flux-lora").setLevel(logging.INFO)
    try:
        print(fetch_lora(arguments.reference, read_settings()).path)
    except (LoraError, SettingsError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
