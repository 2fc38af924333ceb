"""Serving beside others: `python benchmarks/serve.py [--clients N] [--repeats 5] [--json FILE] [--soak 10000]`.

SmolLM2-135M as GGUF Q8_0, streamed answers of 32 to 96 tokens at temperature 0, prompts from vader_tweets and gsm8k.
The sides answer the same questions, each in a process of its own, and take turns: Luthier's server, once as it is and
once with what meets the weights rounded to 8 bits, as llama.cpp does ("luthier_int8"), openvino-genai's pipeline
without any server (same file, same prompts as tokens; "bare" with our settings, "bare_plugin" with its own), and
llama.cpp's server (the xllamacpp wheel). All have as many requests at once as there are clients; a question is asked
once. Figures are medians over the repeats; the percentiles are those of all answers of all repeats.

- tokens per second: all tokens of the answers by the time from the first request to the end of the last answer
- first token: from sending a request to the first piece of its text, but for the first request of each client; those
  come in the same moment, and what the last of them waits stands apart ("at start")
- per token: between two pieces of the text of an answer, of which each has one token
- memory: the resident set of the side's processes after the last turn

`--soak N` sends N short requests to our server alone and says how the memory of its processes grew: from the moment
when long prompts have filled the engine's cache ("from_cold"), and from when the first 500 short ones have made the
engine allocate the buffers for steps of their kind ("growth").
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from serving.questions import questions, requests
from serving.sides import MODEL, Side, bare, llama_cpp, luthier

CLIENTS = (1, 8, 32, 128)
REQUESTS = {1: 6, 8: 48, 32: 128, 128: 256}  # of a turn
REQUESTS_A_CLIENT = 4  # with another number of clients
SIDES = ("luthier", "luthier_int8", "bare", "bare_plugin", "llama_cpp")
OURS = {"luthier": "vs", "luthier_int8": "int8_vs"}  # what their ratios are called
WARM_REQUESTS, WARM_TOKENS = 8, (8, 8)
SOAK_CLIENTS, SOAK_TOKENS, SOAK_SLICE = 8, (8, 8), 500
SOAK_WARM_REQUESTS, SOAK_WARM_QUESTIONS = 300, 12  # long prompts, until the engine's cache is full
CACHE = Path(tempfile.gettempdir()) / "luthier-serve-benchmark"


def main() -> None:
    options = _options()
    home = options.home or CACHE / "home"
    os.environ["LUTHIER_HOME"] = str(home.resolve())
    model = quantised(home)
    with tempfile.TemporaryDirectory() as folder:
        if options.soak:
            result: Any = soak(model, home, Path(folder), options.soak)
        else:
            all_clients = [options.clients] if options.clients else CLIENTS
            results = [measure(model, home, Path(folder), clients, options) for clients in all_clients]
            result = results[0] if options.clients else results
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, help=f"requests at once; without it {', '.join(map(str, CLIENTS))}")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--requests", type=int, help="of each turn")
    parser.add_argument("--only", type=lambda text: text.split(","), default=SIDES, help=f"of {', '.join(SIDES)}")
    parser.add_argument("--soak", type=int, help="how many requests")
    parser.add_argument("--home", type=Path, help="a home that has the base model")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def quantised(home: Path) -> Path:
    """Return a folder with the base model as Q8_0, made once."""
    import shutil

    from luthier.compress.engine.gguf import write_gguf
    from luthier.store.store import Store
    from luthier.workflows.models import pull, served_folder

    folder = CACHE / f"{MODEL}-q8_0"
    if not (folder / "model.gguf").is_file():
        store = Store(home)
        base = store.models.base_folder(pull(store, MODEL))
        shutil.copytree(
            served_folder(store, MODEL), folder, ignore=shutil.ignore_patterns("*.gguf"), dirs_exist_ok=True
        )
        write_gguf(base, folder / "new.gguf", "q8_0", MODEL)
        (folder / "new.gguf").rename(folder / "model.gguf")
    return folder


# Throughput and latency


def measure(model: Path, home: Path, folder: Path, clients: int, options: argparse.Namespace) -> dict[str, Any]:
    """Let the sides take turns with so many clients; return and print their figures."""
    count = options.requests or REQUESTS.get(clients, REQUESTS_A_CLIENT * clients)
    turns: dict[str, list[dict[str, Any]]] = {side: [] for side in options.only}
    with ExitStack() as running:
        sides = _started(running, model, home, folder, clients, options.only)
        for side in sides.values():
            side.run(WARM_REQUESTS, requests(WARM_REQUESTS, skip=len(questions()) - WARM_REQUESTS, tokens=WARM_TOKENS))
        for repeat in range(options.repeats):
            for name in _order(options.only, repeat):
                turns[name].append(_turn(sides[name], clients, requests(count, skip=count * repeat)))
                _say(name, clients, turns[name][-1])
        memory = {name: _memory(side) for name, side in sides.items()}
    figures = {name: _figures(turns[name], memory[name]) if name in turns else None for name in SIDES}
    result = {"clients": clients, **figures, "ratios": _ratios(figures)}
    _print(result)
    return result


def _started(
    running: ExitStack, model: Path, home: Path, folder: Path, clients: int, only: list[str]
) -> dict[str, Side]:
    start = {
        "luthier": lambda: luthier(model, home, folder),
        "luthier_int8": lambda: luthier(model, home, folder, "int8"),
        "bare": lambda: bare(model, "ours", folder),
        "bare_plugin": lambda: bare(model, "plugin", folder),
        "llama_cpp": lambda: llama_cpp(model, max(clients, WARM_REQUESTS), folder),
    }
    return {name: running.enter_context(start[name]()) for name in only}


def _order(names: list[str], repeat: int) -> list[str]:
    """Return the sides in an order in which each comes first, second and third as often."""
    shift = repeat % len(names)
    return [*names[shift:], *names[:shift]]


def _turn(side: Side, clients: int, asked: list[dict[str, Any]]) -> dict[str, Any]:
    before = _processor(side)
    seen = side.run(clients, asked)
    used = _processor(side)
    answers = seen["answers"]
    by_time = sorted(answers, key=lambda answer: answer["sent"])
    seconds = max(answer["ended"] for answer in answers) - min(answer["sent"] for answer in answers)
    tokens = sum(answer["usage"]["completion_tokens"] for answer in answers)
    return {
        "tokens_per_second": tokens / seconds,
        "tokens": tokens,
        "prompt_tokens": sum(answer["usage"]["prompt_tokens"] for answer in answers),
        "seconds": seconds,
        "start": _first_tokens(by_time[:clients]),
        "first": _first_tokens(by_time[clients:]),
        "gaps": [
            later - earlier
            for answer in answers
            for earlier, later in zip(answer["pieces"], answer["pieces"][1:], strict=False)
        ],
        "cores": {name: (used[name] - before[name]) / seconds for name in used}
        | {"client": seen["client_processor_seconds"] / seconds},
    }


def _first_tokens(answers: list[dict[str, Any]]) -> list[float]:
    return [answer["pieces"][0] - answer["sent"] for answer in answers if answer["pieces"]]


def _processor(side: Side) -> dict[str, float]:
    return {name: sum(process.cpu_times()[:2]) for name, process in side.processes.items()}


def _memory(side: Side) -> dict[str, int]:
    return {name: process.memory_info().rss for name, process in side.processes.items()}


def _figures(turns: list[dict[str, Any]], memory: dict[str, int]) -> dict[str, Any]:
    rates = [turn["tokens_per_second"] for turn in turns]
    first = sorted(seconds for turn in turns for seconds in turn["first"])
    start = sorted(seconds for turn in turns for seconds in turn["start"])
    gaps = sorted(seconds for turn in turns for seconds in turn["gaps"])
    return {
        "tokens_per_second": statistics.median(rates),
        "spread": [min(rates), max(rates)],
        "first_token_p50_seconds": percentile(first, 50),
        "first_token_p99_seconds": percentile(first, 99),
        "first_token_at_start_seconds": percentile(start, 100),
        "per_token_p50_seconds": percentile(gaps, 50),
        "per_token_p99_seconds": percentile(gaps, 99),
        "memory_bytes": sum(memory.values()),
        "memory_bytes_by_process": memory,
        "cores": {name: statistics.median(turn["cores"][name] for turn in turns) for name in turns[0]["cores"]},
        "tokens": statistics.median(turn["tokens"] for turn in turns),
        "prompt_tokens": statistics.median(turn["prompt_tokens"] for turn in turns),
        "requests": len(turns[0]["start"]) + len(turns[0]["first"]),
        "repeats": rates,
    }


def percentile(ordered: list[float], percent: float) -> float:
    """Return the smallest value below which so many of the ordered values lie, or that is itself one of them."""
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))] if ordered else 0.0


def _ratios(figures: dict[str, Any]) -> dict[str, float | None]:
    """Return the median over the repeats of our rate by another's of the same repeat: the machine's moods cancel."""
    return {
        f"{word}_{other}": statistics.median(
            a / b for a, b in zip(figures[ours]["repeats"], figures[other]["repeats"], strict=True)
        )
        if figures[ours] and figures[other]
        else None
        for ours, word in OURS.items()
        for other in SIDES
        if other not in OURS
    }


def _say(name: str, clients: int, turn: dict[str, Any]) -> None:
    cores = ", ".join(f"{process} {used:.2f}" for process, used in turn["cores"].items())
    first = percentile(sorted(turn["first"]), 50)
    print(
        f"{clients:4} {name:12} {turn['tokens_per_second']:7.1f} tokens/s  first {first:.3f} s  "
        f"{turn['tokens']} tokens after {turn['prompt_tokens']} in {turn['seconds']:.1f} s  cores: {cores}",
        flush=True,
    )


def _print(result: dict[str, Any]) -> None:
    columns = "tokens/s   lowest  highest   first p50      p99 at start  per token p50      p99      GiB"
    print(f"\n{result['clients']:3} clients  {columns}")
    for name in SIDES:
        if side := result[name]:
            print(
                f"{name:12} {side['tokens_per_second']:9.0f} {side['spread'][0]:8.0f} {side['spread'][1]:8.0f} "
                f"{side['first_token_p50_seconds']:9.3f} s {side['first_token_p99_seconds']:6.3f} s "
                f"{side['first_token_at_start_seconds']:6.3f} s "
                f"{side['per_token_p50_seconds']:12.4f} s {side['per_token_p99_seconds']:6.4f} s "
                f"{side['memory_bytes'] / 2**30:8.2f}"
            )
    print("ratios:", ", ".join(f"{name} {ratio:.3f}" for name, ratio in result["ratios"].items() if ratio), "\n")


# Memory


def soak(model: Path, home: Path, folder: Path, count: int) -> dict[str, Any]:
    """Send many requests; return the memory of our processes after every slice of them, and how it grew."""
    with luthier(model, home, folder) as side:
        side.run(SOAK_CLIENTS, _long_requests())
        samples = [{"requests": -SOAK_SLICE, **_memory(side)}]
        _say_memory(samples[-1])
        for done in range(-SOAK_SLICE, count, SOAK_SLICE):
            size = min(SOAK_SLICE, count - done)
            side.run(SOAK_CLIENTS, requests(size, skip=done + SOAK_SLICE, tokens=SOAK_TOKENS))
            samples.append({"requests": done + size, **_memory(side)})
            _say_memory(samples[-1])
    cold, growth = _growth(samples[0], samples[-1]), _growth(samples[1], samples[-1])
    for name, shares in (("growth", growth), ("from cold", cold)):
        print(f"{name}:", ", ".join(f"{process} {share:+.2%}" for process, share in shares.items()))
    return {"requests": count, "clients": SOAK_CLIENTS, "growth": growth, "from_cold": cold, "samples": samples}


def _growth(first: dict[str, int], last: dict[str, int]) -> dict[str, float]:
    """Return by which share each process has grown, and all of them together."""
    names = [name for name in first if name != "requests"]
    sums = [sum(sample[name] for name in names) for sample in (first, last)]
    return {name: last[name] / first[name] - 1 for name in names} | {"all": sums[1] / sums[0] - 1}


def _long_requests() -> list[dict[str, Any]]:
    """Return requests of many questions each, no two with the same beginning."""
    known, many = questions(), SOAK_WARM_QUESTIONS
    return [
        {"question": "\n".join(known[(index * many + part) % len(known)] for part in range(many)), "max_tokens": 8}
        for index in range(SOAK_WARM_REQUESTS)
    ]


def _say_memory(sample: dict[str, int]) -> None:
    held = ", ".join(f"{name} {size / 2**20:,.1f} MiB" for name, size in sample.items() if name != "requests")
    print(f"{sample['requests']:6} requests: {held}", flush=True)


if __name__ == "__main__":
    main()
