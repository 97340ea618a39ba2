"""The HF Trainer, with one optimizer step's samples in one batch that is split to suit the GPU.

`per_device_train_batch_size x gradient_accumulation_steps` fixes the mathematics: the loss of a step is the mean over
all label tokens of these samples. How many of them go through the GPU at once changes nothing but time and memory.
"""

import contextlib
import dataclasses
import gc
import itertools
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from accelerate.utils import AutocastKwargs
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from qlora.data.batching import StepBatch, count_tokens, label_count, own_samples, split_evenly
from qlora.data.collator import PaddingCollator, PaddingFreeCollator
from qlora.errors import TrainingStopped, stop_all_processes
from qlora.loading import GIB
from qlora.training.saving import (
    check_saved_adapter,
    delete_old_checkpoints,
    publish_files,
    publish_folder,
    staging_dir,
    what_is_kept,
)
from qlora.training.step_check import Step, StepCheck, name_rows
from qlora.training.training_args import samples_per_step

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


def random_states() -> tuple[torch.Tensor, ...]:
    """The states of the host's and the GPU's generators, both of which the host knows."""
    return (torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_available() else []))


def set_random_states(states: tuple[torch.Tensor, ...]):
    """Back to `random_states`."""
    for set_state, state in zip((torch.set_rng_state, torch.cuda.set_rng_state), states, strict=False):
        set_state(state)


class LogBeforeSaving(TrainerCallback):
    """A step that evaluates or saves logs first: its numbers are looked at, and a resumed log goes on from there."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_log = control.should_log or control.should_evaluate or control.should_save

    on_epoch_end = on_step_end


class QLoRATrainer(Trainer):
    """Trains on whole optimizer steps and evaluates by the token.

    Args:
        args: TrainingArguments as the JSON gave them.
        max_tokens: most tokens that go through the model at once; None for the plain way, which is to take the
            batches as the JSON has them, a padded row for each sample.
        kwargs: anything the Trainer takes; datasets have `input_ids` and `labels`, and `line` to name a row by.
    """

    def __init__(self, model, args: TrainingArguments, max_tokens: int | None, callbacks=(), **kwargs):
        step_args = dataclasses.replace(
            args,
            per_device_train_batch_size=samples_per_step(args),
            gradient_accumulation_steps=1,
            remove_unused_columns=False,  # samples keep their line in the data file
        )
        if step_args.n_gpu > 1:  # without torchrun one process trains on one GPU, whatever else is visible
            step_args._n_gpu = 1
        if step_args.device.type == "cpu":  # not "cpu:0", where transformers 5.17 cannot load an optimizer to
            step_args._setup_devices = torch.device("cpu")
        callbacks = [LogBeforeSaving(), *callbacks]
        super().__init__(model=model, args=step_args, data_collator=StepBatch, callbacks=callbacks, **kwargs)
        # The model is in its compute type already; of mixed precision only the loss scaling is wanted.
        self.accelerator.autocast_handler = AutocastKwargs(enabled=False)
        self.max_tokens, self.plain_rows = max_tokens, args.per_device_train_batch_size
        self.collate = (PaddingFreeCollator if max_tokens else PaddingCollator)(self.model.config)
        self.tokens_since_log, self.log_started = 0, time.perf_counter()
        self.step_check, self.run_dir = StepCheck(self.accelerator), args.output_dir

    def train(self, *args, **kwargs):
        """As the Trainer trains; raises TrainingStopped also where Ctrl-C ends it."""
        try:
            return super().train(*args, **kwargs)
        except KeyboardInterrupt:
            reason = f"interrupted after {self.state.global_step} steps. {what_is_kept(self.args.output_dir)}"
            stop_all_processes(reason, self.accelerator.is_main_process)

    def split(self, samples: list[dict]) -> list[list[dict]]:
        """Groups of samples to go through the model one after the other."""
        if self.max_tokens:
            return split_evenly(samples, self.max_tokens)
        return [samples[i : i + self.plain_rows] for i in range(0, len(samples), self.plain_rows)]

    def micro_batch(self, samples: list[dict]) -> dict:
        """A group of samples as the model's inputs, on its device."""
        device = self.args.device
        inputs = self.collate(samples)
        if device.type == "cuda":
            inputs = {name: value.pin_memory().to(device, non_blocking=True) for name, value in inputs.items()}
        return inputs

    def training_step(self, model: torch.nn.Module, inputs: StepBatch, num_items_in_batch=None) -> torch.Tensor:
        """Forward and backward for all samples of an optimizer step, a group at a time."""
        model.train()  # not only if `model.training` is False: that says nothing of the modules inside
        num_labels, random_state = self.count_labels(inputs), random_states()

        def forward_backward(groups: list[list[dict]]) -> torch.Tensor:
            loss = torch.zeros((), device=self.args.device)
            for number, group in enumerate(groups, 1):
                last = number == len(groups)
                with (
                    contextlib.nullcontext() if last else self.accelerator.no_sync(model),
                    self.compute_loss_context_manager(),
                ):
                    group_loss = model(**self.micro_batch(group), num_items_in_batch=num_labels).loss
                    self.accelerator.backward(group_loss)
                loss += group_loss.detach()
            return loss

        def undo():
            model.zero_grad()
            set_random_states(random_state)

        loss = self.in_groups(inputs.items, forward_backward, undo)
        self.tokens_since_log += inputs.num_tokens
        self.step_check.steps.append(Step(self.state.global_step + 1, self._get_learning_rate(), inputs.rows, loss))
        return loss

    def in_groups(
        self, samples: list[dict], run: Callable[[list[list[dict]]], Result], undo: Callable[[], None] = lambda: None
    ) -> Result:
        """What `run` makes of groups of samples; where memory runs out, of smaller groups, from then on.

        Args:
            samples: to be split into groups.
            run: what to do with the groups.
            undo: takes back what an attempt left that ran out of memory.
        """
        while True:
            groups = self.split(samples)
            try:
                return run(groups)
            except torch.OutOfMemoryError as error:
                reason = str(error).split(". ")[0]
            # Not in the handler: as long as it lasts, the error holds on to the tensors of the attempt.
            self.make_groups_smaller(groups, reason)
            undo()

    def make_groups_smaller(self, groups: list[list[dict]], reason: str):
        """Halves the most tokens of a group.

        Raises:
            TrainingStopped: the groups are single samples, or other processes wait for this one's gradients.
        """
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        largest = max((group for group in groups if len(group) > 1), key=count_tokens, default=None)
        if largest is None or (self.model.training and self.args.world_size > 1):
            tokens = max(map(count_tokens, groups))
            raise TrainingStopped(
                f"{reason} after {self.state.global_step} steps, with {tokens} tokens at once. Set a lower "
                "--memory_budget, or lower --max_input_length and --max_output_length; and see in `nvidia-smi` "
                "whether another program uses this GPU."
            )
        if self.max_tokens:
            self.max_tokens = min(self.max_tokens, count_tokens(largest)) // 2
        else:
            self.plain_rows = len(largest) // 2
        size = f"{self.max_tokens} tokens" if self.max_tokens else f"{self.plain_rows} rows"
        logger.warning(
            "%s after %d steps: going on with at most %s at once, which gives the same result in more time.",
            *(reason, self.state.global_step, size),
        )

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: torch.Tensor | None = None) -> torch.Tensor:
        """The norm of the step's gradient, which is remembered."""
        norm = super()._get_grad_norm(model, grad_norm)
        self.step_check.steps[-1].gradient_norm = norm
        return norm

    def get_batch_samples(
        self, epoch_iterator, num_batches: int, device: torch.device
    ) -> tuple[list[StepBatch], None]:
        """The next step's batch; its labels are counted in `training_step`."""
        if self.state.global_step >= self.state.max_steps:
            return [], None  # resumed from the last checkpoint: the Trainer would train a step more
        return list(itertools.islice(epoch_iterator, num_batches)), None

    def count_labels(self, inputs: StepBatch) -> int | torch.Tensor:
        """Label tokens of a step, over all processes; DDP averages gradients, so the mean over processes."""
        count = label_count(inputs.items)
        if count == 0:
            raise TrainingStopped(f"step {self.state.global_step + 1} has no label tokens. {name_rows(inputs.rows)}")
        if self.args.world_size > 1:
            counts = self.accelerator.gather(torch.tensor([count], device=self.args.device))
            return counts.sum() / self.args.world_size
        return count

    def floating_point_ops(self, inputs: StepBatch) -> int:
        """Forward pass and gradient of the activations: 4 operations for each token and weight."""
        return 4 * self.model.config.multiplied_weights * inputs.num_tokens

    def log(self, logs: dict[str, float], start_time: float | None = None):
        """Looks at the numbers of the steps; adds the speed since the last log and the peak of allocated GPU memory.

        Raises:
            TrainingStopped: see `StepCheck.look`.
        """
        self.step_check.look()
        now = time.perf_counter()
        if "loss" in logs:
            logs["tokens_per_second"] = round(self.args.world_size * self.tokens_since_log / (now - self.log_started))
            if torch.cuda.is_available():
                logs["peak_memory_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 2)
            self.tokens_since_log, self.log_started = 0, now
        super().log(logs, start_time)

    @torch.no_grad()
    @torch.random.fork_rng(devices=[])  # the loader draws a number; training draws the same ones without evaluations
    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only=None,
        ignore_keys=None,
        metric_key_prefix="eval",
    ) -> EvalLoopOutput:
        """The mean loss over all label tokens; no logits are kept."""
        started = time.perf_counter()
        model = self.accelerator.unwrap_model(self.model).eval()
        num_samples = len(dataloader.dataset)
        self.callback_handler.eval_dataloader = dataloader  # the progress bar's length
        totals = torch.zeros(2, dtype=torch.float64, device=self.args.device)

        def loss_and_labels(groups: list[list[dict]]) -> torch.Tensor:
            sums = torch.zeros_like(totals)
            for group in groups:
                with self.compute_loss_context_manager():
                    sums[0] += model(**self.micro_batch(group), num_items_in_batch=1).loss
                sums[1] += label_count(group)
            return sums

        for number, batch in enumerate(dataloader):
            turn = number * self.args.world_size + self.args.process_index
            samples = own_samples(batch.items, turn, self.args.eval_batch_size, num_samples)
            if samples:
                totals += self.in_groups(samples, loss_and_labels)
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        loss_sum, labels = self.accelerator.reduce(totals).tolist()
        self.log_started += time.perf_counter() - started
        if not labels or not math.isfinite(loss_sum):
            stop_all_processes(
                f"the evaluation after step {self.state.global_step} has no loss: its sum is {loss_sum} over "
                f"{labels:.0f} label tokens.",
                self.accelerator.is_main_process,
            )
        metrics = {f"{metric_key_prefix}_loss": loss_sum / labels}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=num_samples)

    def _get_output_dir(self, trial) -> str:
        """Where checkpoints are written."""
        return str(self.run_dir)

    def _save_checkpoint(self, model: torch.nn.Module, trial):
        """Writes a checkpoint that has its name only when it is whole."""
        output_dir, name = Path(self.args.output_dir), f"checkpoint-{self.state.global_step}"
        with staging_dir(output_dir, owner=self.args.should_save) as self.run_dir:
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.state.best_model_checkpoint == str(self.run_dir / name):  # as the Trainer found it there
                self.state.best_model_checkpoint = str(output_dir / name)
            if self.args.should_save:
                check_saved_adapter(self.model, self.run_dir / name, output_dir / name)
                self.state.save_to_json(str(self.run_dir / name / "trainer_state.json"))
                publish_folder(self.run_dir / name, output_dir / name, replaced=self.run_dir / "replaced")
                delete_old_checkpoints(output_dir / name, self.args.save_total_limit, self.state.best_model_checkpoint)
        self.run_dir = output_dir

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        """Writes adapter, tokenizer and the log of the run, which appear in `output_dir` when they are whole."""
        if _internal_call:
            return super().save_model(output_dir, _internal_call=True)
        target = Path(output_dir or self.args.output_dir)
        with staging_dir(target, owner=self.args.should_save) as staging:
            super().save_model(str(staging), _internal_call=True)
            if self.args.should_save:
                check_saved_adapter(self.model, staging, target)
                self.state.save_to_json(str(staging / "trainer_state.json"))
                publish_files(staging, target)
        # None ends before the adapter is there; and a process that ends right after exchanging tensors may abort:
        # gloo's threads still let go of them then, which they cannot while the interpreter is being torn down.
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save")
