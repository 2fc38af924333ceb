"""The other side: TRL's trainers, with their defaults, and with the best of their options."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import trl.trainer.utils
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from luthier.llm.engine.torch_model import device, has_fast_bfloat16
from training.candidates import BEST
from training.ours import ALPHA, BETA, GRADIENT_NORM, LEARNING_RATE, RANK, visits
from training.workloads import RANDOM, sequences

# fmt: off
REPORTED = (
    "bf16", "per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "packing",
    "packing_strategy", "padding_free", "max_length", "loss_type", "optim", "learning_rate", "lr_scheduler_type",
    "warmup_steps", "weight_decay", "max_grad_norm", "adam_beta1", "adam_beta2", "adam_epsilon", "model_init_kwargs",
    "torch_compile", "use_cpu", "use_liger_kernel", "beta", "precompute_ref_log_probs", "train_sampling_strategy",
)
# fmt: on


@dataclass(frozen=True)
class Candidate:
    """One way to set TRL up, by its name; see :mod:`training.candidates`."""

    layout: str
    size: int
    variants: frozenset[str]

    @classmethod
    def parse(cls, name: str) -> Candidate:
        """Read a name."""
        head, *variants = name.split("+")
        layout, size = head.split("-")
        return cls(layout, int(size), frozenset(variants))


class _Clock(TrainerCallback):
    def __init__(self) -> None:
        self.ends: list[tuple[float, float]] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append((time.perf_counter(), time.process_time()))


class _Preferences(DPOTrainer):
    """Takes pairs that are tokens already, and times the pass over them with the reference model."""

    reference_seconds = 0.0

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset

    def _precompute_ref_logps(self, *arguments: Any, **named: Any) -> Any:
        started = time.perf_counter()
        dataset = super()._precompute_ref_logps(*arguments, **named)
        self.reference_seconds = time.perf_counter() - started
        return dataset


def run(prepared: dict[str, Any], steps: int, seed: int, folder: Path, name: str) -> dict[str, Any]:
    """Train with TRL: ``name`` is `default`, `best` or a candidate's."""
    disable_progress_bars()
    examples = [prepared["train"][index] for index in visits(prepared, steps, seed)]
    if name == "default":
        options = _batches(8, prepared["batch"])  # 8 is the default of per_device_train_batch_size
    else:
        candidate = Candidate.parse(BEST[prepared["workload"]] if name == "best" else name)
        options = _options(candidate, prepared, examples, steps)
        if "sorted" in candidate.variants:
            examples = _sorted_within_steps(examples, prepared["batch"])
        if "compact" in candidate.variants:
            trl.trainer.utils._use_triton = lambda _: True
    if prepared["workload"].startswith(RANDOM):
        options["max_length"] = None  # these rows are longer than the 1,024 tokens at which TRL cuts by default
    clock = _Clock()
    trainer = _trainer(prepared, examples, options, seed, folder, clock)
    seen = _check(trainer, examples, prepared)
    trainer.train()
    trainer.model.save_pretrained(folder / "adapter")
    return {
        "step_ends": clock.ends,
        **seen,
        "reference_seconds": getattr(trainer, "reference_seconds", 0.0),
        "adapter": str(folder / "adapter"),
        "options": {
            "setup": name if name != "best" else f"best: {BEST[prepared['workload']]}",
            "attention": trainer.model.config._attn_implementation,
            "base_dtype": str(trainer.model.get_base_model().dtype),
            **{key: _plain(getattr(trainer.args, key)) for key in REPORTED if hasattr(trainer.args, key)},
        },
    }


def _options(candidate: Candidate, prepared: dict[str, Any], examples: list[Any], steps: int) -> dict[str, Any]:
    fast = has_fast_bfloat16(device()) != ("other_precision" in candidate.variants)
    attention = "eager" if "eager" in candidate.variants else "sdpa"
    options: dict[str, Any] = {
        "bf16": fast,
        "gradient_checkpointing": "recompute" in candidate.variants,
        "torch_compile": "compile" in candidate.variants,
        "model_init_kwargs": {"dtype": "bfloat16" if fast else "float32", "attn_implementation": attention},
    }
    if "liger" in candidate.variants and torch.cuda.is_available():
        options["use_liger_kernel"] = True
    if prepared["workload"] == "dpo":
        options["precompute_ref_log_probs"] = "precompute" in candidate.variants
    if candidate.layout == "packed":
        rows = max(1, round(sum(len(example["tokens"]) for example in examples) / steps / candidate.size))
        options |= _batches(1, rows) | {"packing": True, "max_length": candidate.size}
    else:
        options |= _batches(candidate.size, prepared["batch"])
    if candidate.layout == "free":
        options |= {"padding_free": True, "max_length": None}
    return options


def _batches(per_device: int, batch: int) -> dict[str, int]:
    per_device = min(per_device, batch)
    assert batch % per_device == 0
    return {"per_device_train_batch_size": per_device, "gradient_accumulation_steps": batch // per_device}


def _sorted_within_steps(examples: list[Any], batch: int) -> list[Any]:
    batches = [examples[first : first + batch] for first in range(0, len(examples), batch)]
    return [example for some in batches for example in sorted(some, key=lambda e: -max(map(len, sequences(e))))]


def _trainer(
    prepared: dict[str, Any], examples: list[Any], options: dict[str, Any], seed: int, folder: Path, clock: _Clock
) -> Any:
    common = {
        "output_dir": str(folder),
        "num_train_epochs": 1,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": GRADIENT_NORM,
        "train_sampling_strategy": "sequential",
        "seed": seed,
        "use_cpu": device().type == "cpu",
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **options,
    }
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    torch.manual_seed(seed)
    rest = {"model": prepared["base_folder"], "peft_config": lora, "callbacks": [clock]}
    if prepared["workload"] == "dpo":
        names = {"prompt": "prompt_ids", "chosen": "chosen_ids", "rejected": "rejected_ids"}
        data = Dataset.from_list([{names[key]: value for key, value in pair.items()} for pair in examples])
        return _Preferences(args=DPOConfig(beta=BETA, **common), train_dataset=data, **rest)
    data = Dataset.from_list([{"input_ids": e["tokens"], "labels": list(_labels(e))} for e in examples])
    return SFTTrainer(args=SFTConfig(**common), train_dataset=data, **rest)


Labelled = tuple[tuple[int, ...], tuple[int, ...]]


def _labels(example: dict[str, list[int]]) -> tuple[int, ...]:
    """Return the labels of an example; nothing predicts a first token."""
    pairs = zip(example["tokens"], example["mask"], strict=True)
    return tuple(token if learned and place else -100 for place, (token, learned) in enumerate(pairs))


def _check(trainer: Any, examples: list[dict[str, list[int]]], prepared: dict[str, Any]) -> dict[str, Any]:
    """Go through what TRL would train on, and make sure that it is the given tokens and labels, step by step."""
    batches = list(trainer.get_train_dataloader())
    per_step = trainer.args.gradient_accumulation_steps
    found = [
        [item for batch in batches[i : i + per_step] for item in _split(batch)]
        for i in range(0, len(batches), per_step)
    ]
    if "tokens" in examples[0]:
        wanted = [[(tuple(example["tokens"]), _labels(example))] for example in examples]
    else:
        wanted = [[_answer(pair, "chosen"), _answer(pair, "rejected")] for pair in examples]
    if getattr(trainer.args, "packing", False):  # what shares a step is TRL's choice
        assert Counter(item for step in found for item in step) == Counter(item for items in wanted for item in items)
    else:
        for number, step in enumerate(found):
            expected = wanted[number * prepared["batch"] : (number + 1) * prepared["batch"]]
            assert Counter(step) == Counter(item for items in expected for item in items), f"step {number} differs"
    return {
        "step_tokens": [sum(len(tokens) for tokens, _ in step) for step in found],
        "step_examples": [len(step) // len(wanted[0]) for step in found],
        "computed_tokens": sum(batch["input_ids"].numel() for batch in batches),
    }


def _answer(pair: dict[str, list[int]], which: str) -> Labelled:
    prompt, answer = pair["prompt"], pair[which]
    return tuple(prompt + answer), tuple([-100] * len(prompt) + answer)


def _split(batch: dict[str, torch.Tensor]) -> Iterator[Labelled]:
    """Yield the tokens and labels of each example in a collated batch, without padding."""
    tokens = batch["input_ids"]
    labels = batch["labels"] if "labels" in batch else tokens.masked_fill(batch["completion_mask"] == 0, -100)
    if "attention_mask" in batch:
        for row, mask in enumerate(batch["attention_mask"].bool()):
            yield tuple(tokens[row][mask].tolist()), tuple(labels[row][mask].tolist())
        return
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    for start, end in zip(starts, [*starts[1:], tokens.shape[1]], strict=True):
        yield tuple(tokens[0, start:end].tolist()), tuple(labels[0, start:end].tolist())


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool | None | dict | list) else str(value)
