"""What the scripts, tests and benchmarks share. None of it goes into the container."""
