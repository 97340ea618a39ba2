"""Losses and gradients that are not finite: checked when the Trainer logs, reported with step and data rows."""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from qlora.data.batching import SourceRow
from qlora.errors import stop_all_processes
from qlora.training.checkpoints import resume_advice

MOST_SKIPPED = 32  # consecutive steps that loss scaling may skip: each halves the scale, 65536 at first


@dataclass
class Step:
    """An optimizer step.

    Attributes:
        number: of the step, from 1.
        learning_rate: of the step.
        rows: its data rows, on this process.
        loss: scalar, on the device, so that it is not waited for.
        gradient_norm: the same; None until it is computed.
    """

    number: int
    learning_rate: float
    rows: list[SourceRow]
    loss: torch.Tensor
    gradient_norm: torch.Tensor | None = None

    def __str__(self) -> str:
        return f"step {self.number} (learning rate {self.learning_rate:.3g})"


class StepCheck:
    """The steps since the last check. Adding a step does not synchronize with the device; a check does so once.

    Args:
        accelerator: of the run. If it scales the loss, a gradient that overflows is no error: the step is skipped.
        output_dir: of the run, whose newest checkpoint a message names.
    """

    def __init__(self, accelerator: Accelerator, output_dir: str):
        self.accelerator, self.output_dir, self.skipped = accelerator, output_dir, 0
        self.steps: list[Step] = []

    def check(self):
        """Checks all steps since the last check, on all processes together, and empties the list.

        Raises:
            TrainingStopped: on the main process: a loss is not finite or exactly zero, or a gradient is not finite;
                where the loss is scaled, in more than MOST_SKIPPED consecutive steps.
            SystemExit: the same, on the other processes.
        """
        if not self.steps:
            return
        losses = torch.stack([step.loss for step in self.steps])
        norms = torch.stack([step.gradient_norm for step in self.steps if step.gradient_norm is not None])
        values = self.accelerator.gather(torch.stack((losses, norms), dim=1)[None].float()).cpu()  # [processes, n, 2]
        for number, step in enumerate(self.steps):
            problem = self.problem(*values[:, number].T)
            if problem:
                self.stop(step, problem, not_finite=~values[:, number, 0].isfinite())
        self.steps.clear()

    def problem(self, losses: torch.Tensor, norms: torch.Tensor) -> str | None:
        """What is wrong with a step, or None; `losses` and `norms` [processes] have a value of each process."""
        loss, norm = losses.mean().item(), norms[0].item()
        if not losses.isfinite().all():
            return f"the loss is {loss}"
        if loss == 0:
            return "the loss is exactly zero, so that there is nothing to learn from"
        if norms.isfinite().all():
            self.skipped = 0
            return None
        self.skipped += 1
        if self.accelerator.scaler is None:
            return f"the gradient is not finite (its norm is {norm}), while the loss is {loss:.4g}"
        if self.skipped > MOST_SKIPPED:
            return f"the gradient was not finite in {self.skipped} steps in a row, however small the loss was scaled"
        return None

    def stop(self, step: Step, problem: str, not_finite: torch.Tensor):
        """Ends the run with a message that names data rows.

        Args:
            step: in which the problem was found.
            problem: the beginning of the message.
            not_finite: [processes], bool, whose loss is not finite: their rows are named, or those of all processes
                if there is none.
        """
        rows = gather_object([step.rows])
        rows = [process_rows for process_rows, failed in zip(rows, not_finite, strict=True) if failed] or rows
        stop_all_processes(
            f"{step}: {problem}. {name_rows(itertools.chain(*rows))} Look at them, or lower learning_rate in the "
            f"JSON. {resume_advice(self.output_dir)}"
        )


def name_rows(rows: Iterable[SourceRow]) -> str:
    """A sentence with the numbers of data rows, by file."""
    by_file = itertools.groupby(sorted(rows), key=lambda row: (row.file, row.kind))
    named = [
        f"{kind}s {', '.join(str(row) for row in group)} of {file or 'the training data'}"
        for (file, kind), group in by_file
    ]
    return f"Its rows are on {'; '.join(named)}."
