"""What the scripts, tests and benchmarks share. None of it goes into the container."""

from pathlib import Path

ROOT = Path(__file__).parent.parent  # of the project
