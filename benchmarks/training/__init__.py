"""The parts of `benchmarks/train.py`; each module but this runs in child processes only."""
