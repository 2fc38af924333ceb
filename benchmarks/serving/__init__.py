"""The parts of ``benchmarks/serve.py``: the questions, the client, and the sides that are measured."""
