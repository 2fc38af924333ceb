"""Training beside TRL: `python benchmarks/train.py --workload A|B|C|dpo [--steps N] [--repeats 3] [--json FILE]`.

On a GPU: `--workload llama-2048|llama-8192`, a Llama of 8 billion random parameters and full rows of so many tokens;
TRL's best needs the package liger-kernel there. `--size tiny` tries the same way on any machine.

Four sides train on the same tokens, loss masks, order, batches and hyperparameters: ours with the best of its options
(precision=int8 where the processor multiplies integers far faster) and as it is by default, TRL with the best of its
options (`--tune` times them) and as it is by default. Every measured run is a process of its own; the sides take
turns; figures are medians over the repeats, each with its own seed for all sides.

- tokens per second: each example's own tokens, as if nothing were shared or padded, by wall time of the optimizer
  steps after the first two. A pass over the pairs with the reference model before training counts by its share.
- cores used: processor by wall time of these steps; well below the number of threads, others use the machine
- peak memory: the process' largest resident set (on a GPU: the allocator's peak)
- held-out loss: by plain transformers with the adapter that a side left, float32, one example at a time
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# Nothing heavy is imported here: a child's peak memory starts from that of its parent.
HERE = Path(__file__).parent
SIDES = ("ours", "ours_default", "trl_default", "trl_best")
STEPS = {"A": 20, "B": 16, "C": 10, "dpo": 16, "llama-2048": 8, "llama-8192": 8}
WARM_STEPS = 2
FIGURES = (
    "tokens_per_second",
    "examples_per_second",
    "seconds_per_step",
    "peak_memory_bytes",
    "seconds_whole",
    "cores_used",
)


def main() -> None:
    options = _options()
    steps = options.steps or STEPS[options.workload]
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(options.workload, steps, options.size, options.home, Path(temporary))
        machine = bench.prepare()
        if options.tune:
            _tune(bench, options.only)
            return
        sides = options.only or [side for side in SIDES if side != "ours_default" or machine["has_fast_integers"]]
        runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
        for repeat in range(options.repeats):
            for side in sides:
                runs[side].append(bench.train(side, repeat))
                _say(side, runs[side][-1])
        losses = bench.judge([run["adapter"] for side in sides for run in runs[side]])
    result = _result(options, steps, machine, runs, losses)
    _print(result, losses["base"])
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=list(STEPS), required=True)
    parser.add_argument("--steps", type=int, help=f"optimizer steps, {WARM_STEPS} of them not timed")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--size", choices=("8b", "tiny"), default="8b", help="of a random Llama")
    parser.add_argument("--home", type=Path, help="a home that has the base model")
    parser.add_argument("--only", type=lambda text: text.split(","), help=f"of {', '.join(SIDES)}; or candidates")
    parser.add_argument("--tune", action="store_true", help="time ways to set TRL up, and print them")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.steps is not None and options.steps <= WARM_STEPS:
        parser.error(f"--steps must be more than {WARM_STEPS}")
    if not options.tune and not set(options.only or SIDES) <= set(SIDES):
        parser.error(f"--only takes {', '.join(SIDES)}")
    return options


class Bench:
    """Starts the child processes of one workload."""

    def __init__(self, workload: str, steps: int, size: str, home: Path | None, folder: Path) -> None:
        self.workload = workload
        self.steps = steps
        self.size = size
        self.home = home or folder / "home"
        self.folder = folder
        self.prepared = folder / "prepared.json"
        self.matmul_flops = 0.0
        self._count = 0

    def prepare(self) -> dict[str, Any]:
        """Write the workload's tokens; return what the machine is."""
        what = {"workload": self.workload, "size": self.size, "steps": self.steps}
        spec = {"job": "prepare", "home": str(self.home.resolve()), **what}
        machine = self._child(spec)
        self.matmul_flops = machine["matmul_flops"]
        return machine

    def train(self, side: str, seed: int) -> dict[str, Any]:
        """Train one side in a fresh process; return what was measured."""
        raw = self._child({"job": "train", "side": side, "steps": self.steps, "seed": seed})
        return _figures(raw, self.matmul_flops)

    def judge(self, adapters: list[str]) -> dict[str, float]:
        """Return the held-out loss with each adapter."""
        return self._child({"job": "judge", "adapters": adapters})["losses"]

    def _child(self, spec: dict[str, Any]) -> dict[str, Any]:
        self._count += 1
        folder = self.folder / str(self._count)
        folder.mkdir()
        spec |= {"prepared": str(self.prepared), "folder": str(folder), "result": str(folder / "result.json")}
        (folder / "spec.json").write_text(json.dumps(spec))
        paths = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
        quiet = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(self.folder / "cache"), "PYTHONWARNINGS": "ignore"}
        quiet["GOMP_SPINCOUNT"] = "1000"  # as Luthier's workers; else another busy process stops all sides
        done = subprocess.run(
            [sys.executable, "-m", "training.child", str(folder / "spec.json")],
            env=os.environ | quiet | {"PYTHONPATH": paths},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(
                f"{spec['job']} {spec.get('side', '')} ended with {done.returncode}:\n{done.stderr[-4000:]}"
            )
        return json.loads((folder / "result.json").read_text())


def _figures(raw: dict[str, Any], matmul_flops: float) -> dict[str, Any]:
    """Turn what a child measured into rates over the steps after the warm-up."""
    ends, warm = raw["step_ends"], WARM_STEPS
    assert len(ends) == len(raw["step_tokens"]) > warm, "too few steps to time"
    tokens, examples, steps = sum(raw["step_tokens"][warm:]), sum(raw["step_examples"][warm:]), len(ends) - warm
    reference = raw.get("reference_seconds", 0.0) * tokens / sum(raw["step_tokens"])
    wall, processor = (last - first for first, last in zip(ends[warm - 1], ends[-1], strict=True))
    seconds = wall + reference
    figures = {
        "tokens_per_second": tokens / seconds,
        "examples_per_second": examples / seconds,
        "seconds_per_step": seconds / steps,
        "cores_used": processor / wall,
        "peak_memory_bytes": raw["peak_memory_bytes"],
        "seconds_whole": raw["seconds_whole"],
        "steps": len(ends),
        "computed_per_real_token": raw["computed_tokens"] / sum(raw["step_tokens"]),
        "adapter": raw["adapter"],
        "options": raw["options"],
    }
    if "arithmetic" in raw:
        share = raw["arithmetic"]["flop_per_real_token"] * figures["tokens_per_second"] / matmul_flops
        figures |= {"arithmetic": raw["arithmetic"], "matmul_share": share}
    return figures


def _result(
    options: argparse.Namespace,
    steps: int,
    machine: dict[str, Any],
    runs: dict[str, list[dict[str, Any]]],
    losses: dict[str, float],
) -> dict[str, Any]:
    sides = {side: _side(runs[side], losses) if side in runs else None for side in SIDES}
    machine.pop("seconds_whole")
    settings = {"steps": steps, "warm_steps": WARM_STEPS, "repeats": options.repeats, "base_valid_loss": losses["base"]}
    return {
        "workload": options.workload,
        "machine": machine,
        "settings": settings,
        **sides,
        "ratios": _ratios(sides, "ours"),
        "ratios_by_default": _ratios(sides, "ours_default"),
    }


def _side(runs: list[dict[str, Any]], losses: dict[str, float]) -> dict[str, Any]:
    """Return the medians over a side's repeats, with every repeat's values."""
    repeats = [{name: run[name] for name in FIGURES} | {"valid_loss": losses[run["adapter"]]} for run in runs]
    rates = [repeat["tokens_per_second"] for repeat in repeats]
    side: dict[str, Any] = {name: statistics.median(r[name] for r in repeats) for name in (*FIGURES, "valid_loss")}
    side |= {"spread": [min(rates), max(rates)], "repeats": repeats, "options": runs[0]["options"]}
    side |= {"steps": runs[0]["steps"], "computed_per_real_token": runs[0]["computed_per_real_token"]}
    if "matmul_share" in runs[0]:
        side["matmul_share"] = statistics.median(run["matmul_share"] for run in runs)
        side["arithmetic"] = runs[0]["arithmetic"]
    return side


def _ratios(sides: dict[str, Any], ours: str) -> dict[str, float | None]:
    def ratio(name: str, other: str) -> float | None:
        return sides[ours][name] / sides[other][name] if sides[ours] and sides[other] else None

    return {
        "tokens_per_second_vs_default": ratio("tokens_per_second", "trl_default"),
        "tokens_per_second_vs_best": ratio("tokens_per_second", "trl_best"),
        "peak_memory_vs_best": ratio("peak_memory_bytes", "trl_best"),
        "validation_loss_vs_best": ratio("valid_loss", "trl_best"),
    }


def _tune(bench: Bench, names: list[str] | None) -> None:
    from training.candidates import CANDIDATES

    for name in names or CANDIDATES[bench.workload]:
        try:
            _say(name, bench.train(name if name in SIDES else f"trl_{name}", 0))
        except SystemExit as error:
            print(f"{name:26} failed: {str(error).strip().splitlines()[-1]}", flush=True)


def _say(side: str, run: dict[str, Any]) -> None:
    print(
        f"{side:26} {run['tokens_per_second']:9,.0f} tokens/s  {run['seconds_per_step']:7.2f} s/step  "
        f"{run['cores_used']:4.1f} cores  "
        f"{run['computed_per_real_token']:5.2f} computed/real  {run['peak_memory_bytes'] / 1e9:5.2f} GB  "
        f"{run['seconds_whole']:5.0f} s in all",
        flush=True,
    )


def _print(result: dict[str, Any], base_loss: float) -> None:
    machine = result["machine"]
    print(
        f"\nWorkload {result['workload']} on {machine['device_name']}, {machine['threads']} threads, "
        f"{machine['matmul_flops'] / 1e9:,.0f} GFLOP/s; held-out loss before training {base_loss:.4f}"
    )
    print(
        f"{'':12} {'tokens/s':>9} {'lowest':>8} {'highest':>8} {'examples/s':>10} {'s/step':>7} {'GB':>6} {'loss':>8}"
    )
    for name in SIDES:
        if side := result[name]:
            print(
                f"{name:12} {side['tokens_per_second']:9,.0f} {side['spread'][0]:8,.0f} {side['spread'][1]:8,.0f} "
                f"{side['examples_per_second']:10.2f} {side['seconds_per_step']:7.2f} "
                f"{side['peak_memory_bytes'] / 1e9:6.2f} {side['valid_loss']:8.4f}"
            )
    print(f"{'':30} {'ours':>10} {'by default':>10}")
    for name, ratio in result["ratios"].items():
        both = (ratio, result["ratios_by_default"][name])
        print(f"{name:30}", *("" if value is None else f"{value:10.3f}" for value in both))
    for side in ("ours", "ours_default"):
        _print_arithmetic(side, result[side])


def _print_arithmetic(name: str, side: dict[str, Any] | None) -> None:
    if side and "arithmetic" in side:
        parts = side["arithmetic"]
        shares = ", ".join(
            f"{name} {parts[f'{name}_flop_per_computed_token'] / 1e6:,.1f}"
            for name in ("linear", "adapter", "attention", "vocabulary")
        )
        print(
            f"{name} ({side['options']['precision']}): {side['computed_per_real_token']:.3f} computed tokens per real "
            f"one; million operations of each: {shares}; {side['matmul_share']:.0%} of the rate without integers"
        )


if __name__ == "__main__":
    main()
