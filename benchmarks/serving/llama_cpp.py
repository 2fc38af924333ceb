"""llama.cpp's server: ``python -m serving.llama_cpp FOLDER SLOTS`` runs that of the xllamacpp wheel.

It prints its address, and ends when its standard input does. A slot has room for the longest prompt and answer.
"""

from __future__ import annotations

import json
import os
import sys

import xllamacpp

SLOT_TOKENS = 768


def main() -> None:
    folder, slots = sys.argv[1], int(sys.argv[2])
    params = xllamacpp.CommonParams()
    params.model.path = f"{folder}/model.gguf"
    params.port = 0
    params.n_parallel = slots
    params.n_ctx = slots * SLOT_TOKENS
    params.cpuparams.n_threads = os.cpu_count() or 1
    params.cpuparams_batch.n_threads = os.cpu_count() or 1
    params.n_threads_http = slots + 2  # a stream holds a thread
    params.ui = False
    params.verbosity = 0
    server = xllamacpp.Server(params)
    print(json.dumps({"url": server.listening_address}), flush=True)
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()
