"""What a training run says while it learns, passed on to whoever keeps or shows it."""

from __future__ import annotations

import time

from luthier.evaluate.contest import sample
from luthier.jobs.context import RunContext
from luthier.records.training import StepMetrics
from luthier.train.engine.trackers import Trackers, values_of
from luthier.train.notes import Note, PreparationNote, SampleNote, SavedNote, WarningNote, WeightsNote
from luthier.workflows.checkpoints import keep_checkpoint
from luthier.workflows.material import Prepared
from luthier.workflows.step_metrics import StepLog, openai_metrics

EVENT_SECONDS = 0.5


class TrainingWatch:
    """Passes on what a run says: all numbers to trackers and log, to the run's events at most two a second.

    Args:
        context: The run.
        prepared: What it learns from.
        trackers: Where its numbers and samples are shown.
        log: Where its numbers are kept.
        model: The name that its model will have.
    """

    def __init__(self, context: RunContext, prepared: Prepared, trackers: Trackers, log: StepLog, model: str) -> None:
        self._context = context
        self._prepared = prepared
        self._trackers = trackers
        self._log = log
        self._model = model
        self._last = 0.0

    def step(self, metrics: StepMetrics) -> None:
        """Hear of a step."""
        self._log.write(metrics)
        self._trackers.write(metrics.step, values_of(metrics))
        now = time.monotonic()
        if now - self._last < EVENT_SECONDS and metrics.valid_loss is None and metrics.step != metrics.steps:
            return
        self._last = now
        loss = "not a finite number" if metrics.train_loss is None else f"{metrics.train_loss:.3f}"
        text = f"Step {metrics.step}/{metrics.steps}: training loss={loss}"
        if metrics.valid_loss is not None:
            text += f", validation loss={metrics.valid_loss:.3f}"
        self._context.metrics(text, metrics.model_dump(mode="json"))

    def note(self, note: Note) -> None:
        """Hear of a warning, sample answers, what is done before the first step, an epoch's weights, a saved state."""
        match note:
            case WarningNote(warning=warning):
                text = f"{warning.message} Try: {warning.hint}"
                self._context.say(text, level="warning", data=warning.model_dump(mode="json"))
            case SampleNote():
                self._samples(note)
            case PreparationNote(what=what, share=share):
                self._context.progress(what, round(100 * share), 100)
            case WeightsNote():
                self._keep(note)
            case SavedNote():
                self._context.came_forward()

    def _keep(self, note: WeightsNote) -> None:
        step, measured = note.metrics.step, openai_metrics(note.metrics.model_dump(mode="json"))
        base, run = self._prepared.base.id, self._context.run
        measured.pop("total_steps", None)
        keep_checkpoint(self._context.store, run, base, self._model, note.folder, step, measured)
        self._context.say(f"Checkpoint created at step {step}", data={"step": step})

    def _samples(self, note: SampleNote) -> None:
        chat_format, options = self._prepared.chat_format, self._prepared.request.options
        if chat_format is None:
            return
        asked = sample(self._prepared.sampled, options.samples, options.seed)
        answers = [chat_format.decode(tokens) for tokens in note.answers]
        found = [
            {"question": one.prompt[-1].content, "expected": one.answer, "answer": answer}
            for one, answer in zip(asked, answers, strict=True)
        ]
        shown = "\n\n".join(f"> {one['question']}\n\n{one['answer']}" for one in found)
        self._trackers.text(note.step, "samples", shown)
        first = found[0]
        self._context.say(f"Sample at step {note.step}: {first['answer']!r}", data={"samples": found})
