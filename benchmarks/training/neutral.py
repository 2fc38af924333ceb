"""The judge of all sides: plain transformers with each side's adapter, float32, one example at a time."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from luthier.llm.engine.torch_model import device
from training.ours import BETA


def held_out_losses(prepared: dict[str, Any], adapters: list[str]) -> dict[str, float]:
    """Return the held-out loss with each adapter (by its folder), and of the ``base`` alone."""
    model: Any = AutoModelForCausalLM.from_pretrained(prepared["base_folder"], dtype=torch.float32)
    model.to(device()).eval()
    pairs = prepared["workload"] == "dpo"
    examples = prepared["held_out"]
    with torch.inference_mode():
        reference = [_margin(model, pair) for pair in examples] if pairs else []
        losses = {"base": _preference_loss(reference, reference) if pairs else _mean_loss(model, examples)}
        for folder in adapters:
            tuned = PeftModel.from_pretrained(model, folder).eval()
            if pairs:
                losses[folder] = _preference_loss([_margin(tuned, pair) for pair in examples], reference)
            else:
                losses[folder] = _mean_loss(tuned, examples)
            model = tuned.unload()
    return losses


def _mean_loss(model: Any, examples: list[dict[str, list[int]]]) -> float:
    """Return the mean loss over all target tokens."""
    total, count = 0.0, 0
    for example in examples:
        logprobs = _logprobs(model, example["tokens"])
        mask = torch.tensor(example["mask"][1:], dtype=torch.bool, device=logprobs.device)
        total -= float(logprobs[mask].sum())
        count += int(mask.sum())
    return total / count


def _preference_loss(margins: list[float], reference: list[float]) -> float:
    """Return -log sigmoid(beta (margin - margin of the reference)), Rafailov et al. 2023, equation 7."""
    differences = torch.tensor(margins) - torch.tensor(reference)
    return float(-torch.nn.functional.logsigmoid(BETA * differences).mean())


def _margin(model: Any, pair: dict[str, list[int]]) -> float:
    """Return log p(chosen) - log p(rejected)."""
    cut = len(pair["prompt"]) - 1
    chosen, rejected = (_logprobs(model, pair["prompt"] + pair[which])[cut:].sum() for which in ("chosen", "rejected"))
    return float(chosen - rejected)


def _logprobs(model: Any, tokens: list[int]) -> torch.Tensor:
    """Return the log-probability of every token but the first."""
    ids = torch.tensor([tokens], device=model.device)
    logprobs = model(input_ids=ids).logits[0, :-1].float().log_softmax(dim=-1)
    return logprobs.gather(1, ids[0, 1:, None])[:, 0]
