"""The Hugging Face Trainer, with all samples of an optimizer step in one batch that is split into micro-batches here.

`per_device_train_batch_size x gradient_accumulation_steps` fixes the result: the loss of a step is the mean over all
label tokens of these samples. The size of the micro-batches changes only time and memory.
"""

import contextlib
import dataclasses
import gc
import itertools
import logging
import math
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from accelerate.utils import AutocastKwargs
from huggingface_hub import HfApi
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from glm_kernels import kernels_supported
from qlora.atomic import publish_files, publish_folder, write_json
from qlora.data.batching import Sample, StepBatch, count_labels, count_tokens, own_samples, split_evenly
from qlora.data.collator import PaddingCollator, PaddingFreeCollator
from qlora.errors import TrainingStopped, stop_all_processes
from qlora.layers.linear import draw_seed
from qlora.layers.replacement import dropout_seed
from qlora.training.checkpoints import (
    STAGING,
    best_checkpoint,
    check_saved_adapter,
    delete_old_checkpoints,
    resume_advice,
    staging_dir,
)
from qlora.training.graphs import GraphedPasses
from qlora.training.model_card import UPLOADED
from qlora.training.same_run import RUN_FILE
from qlora.training.step_check import Step, StepCheck, name_rows
from qlora.training.stopping import StopOnSignal
from qlora.training.training_args import samples_per_step
from qlora.units import GIB

logger = logging.getLogger(__name__)
STEPS_TO_RECORD_ANEW = 50  # at least, between two times; recording takes about 0.1 s for each of a dozen sizes

Result = TypeVar("Result")


def random_states() -> tuple[torch.Tensor, ...]:
    """The states of the CPU's and the GPU's random generators; reading them does not synchronize."""
    return (torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_available() else []))


def set_random_states(states: tuple[torch.Tensor, ...]):
    """Restores what `random_states` returned."""
    for set_state, state in zip((torch.set_rng_state, torch.cuda.set_rng_state), states, strict=False):
        set_state(state)


class LogBeforeSaving(TrainerCallback):
    """Makes a step that evaluates or saves log first, so that its loss is checked and a resumed log is complete."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_log = control.should_log or control.should_evaluate or control.should_save

    on_epoch_end = on_step_end


class FindBestCheckpoint(TrainerCallback):
    """Finds the best checkpoint beside the one that a run resumes from; the Trainer has the path at which it was."""

    def __init__(self, resume_from: str):
        self.best = best_checkpoint(resume_from)

    def on_train_begin(self, args, state, control, **kwargs):
        state.best_model_checkpoint = str(self.best) if self.best and self.best.is_dir() else None
        if state.best_model_checkpoint:
            logger.info("The best checkpoint so far: %s", state.best_model_checkpoint)


class QLoRATrainer(Trainer):
    """Trains on whole optimizer steps and evaluates the mean loss over tokens.

    Args:
        model: in its compute dtype, with the layers that it is trained with.
        args: TrainingArguments as the JSON gave them.
        max_tokens: most tokens of a micro-batch; None for the plain path, whose micro-batches are the JSON's, a padded
            row for each sample.
        run: what defines the run, see `describe_run`; without it no run can resume from its checkpoints.
        kwargs: anything else the Trainer takes; datasets have `input_ids` and `labels`, and `line` to name a row by.
    """

    control: TrainerControl

    def __init__(self, model, args: TrainingArguments, max_tokens: int | None, run: dict | None = None, **kwargs):
        step_args = dataclasses.replace(
            args,
            per_device_train_batch_size=samples_per_step(args),
            gradient_accumulation_steps=1,
            remove_unused_columns=False,  # `line` and `file` name a row in messages
        )
        if step_args.n_gpu > 1:  # one process trains on one GPU; torchrun starts more processes
            step_args._n_gpu = 1
        if step_args.device.type == "cpu":  # not "cpu:0": transformers 5.17 cannot load an optimizer there
            step_args._setup_devices = torch.device("cpu")
        self.stop = StopOnSignal()
        kwargs |= {"data_collator": StepBatch.collate, "callbacks": [self.stop, LogBeforeSaving()]}
        super().__init__(model=model, args=step_args, **kwargs)
        # The model is in its compute dtype; of mixed precision only the loss scaling is needed.
        self.accelerator.autocast_handler = AutocastKwargs(enabled=False)
        self.max_tokens, self.plain_rows = max_tokens, args.per_device_train_batch_size
        self.collate = (PaddingFreeCollator if max_tokens else PaddingCollator)(self.model.config)
        self.dropout_seed = dropout_seed(self.model)
        self.graphs: GraphedPasses | None = None
        self.forgot_graphs_at = -math.inf  # the training step at which there was too little memory for more of them
        if isinstance(self.collate, PaddingFreeCollator) and self.args.world_size == 1:
            most_samples = max(step_args.per_device_train_batch_size, step_args.per_device_eval_batch_size)
            if kernels_supported(self.model.get_input_embeddings().weight):
                self.graphs = GraphedPasses(self.model, self.collate, most_samples)
        self.tokens_since_log, self.log_started = 0, time.perf_counter()
        self.step_check = StepCheck(self.accelerator, args.output_dir)
        self.run, self.has_trained = run or {}, False

    def train(self, resume_from_checkpoint: str | None = None):
        """See `Trainer.train`.

        Raises:
            KeyboardInterrupt: Ctrl-C, with a message for the user.
            SystemExit: a signal of `STOP_SIGNALS`, with exit status 128 + its number.
        """
        if resume_from_checkpoint:
            self.add_callback(FindBestCheckpoint(resume_from_checkpoint))
        try:
            with self.stop.signals_handled():
                result = super().train(resume_from_checkpoint)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"interrupted {self.progress()}") from None
        if self.stop.stopping:
            logger.warning("%s: stopped %s", signal.Signals(self.stop.stopping).name, self.progress())
            self.accelerator.wait_for_everyone()  # torchrun ends a job when its first process exits
            self.accelerator.end_training()
            raise SystemExit(128 + self.stop.stopping)
        return result

    def progress(self) -> str:
        """How far training came, what is kept of it, and how to go on; the end of a sentence."""
        if self.args.save_strategy == "no":
            kept = 'Nothing is kept, since save_strategy in the JSON is "no".'
        else:
            kept = resume_advice(self.args.output_dir)
        return f"after {self.state.global_step} steps. {kept}"

    def split(self, samples: list[Sample]) -> list[list[Sample]]:
        """The micro-batches of a step."""
        if self.max_tokens:
            return split_evenly(samples, self.max_tokens)
        return [samples[i : i + self.plain_rows] for i in range(0, len(samples), self.plain_rows)]

    def model_inputs(self, micro_batch: list[Sample]) -> dict:
        """A micro-batch as the keyword arguments of the model, on its device."""
        device = self.args.device
        inputs = self.collate(micro_batch)
        if device.type == "cuda":
            inputs = {name: value.pin_memory().to(device, non_blocking=True) for name, value in inputs.items()}
        return inputs

    def training_step(self, model: torch.nn.Module, inputs: StepBatch, num_items_in_batch=None) -> torch.Tensor:
        """Forward and backward for all samples of an optimizer step, one micro-batch after the other."""
        self.has_trained = True
        model.train()  # always: evaluation mode may have been set on an inner module
        num_labels, random_state = self.count_labels(inputs), random_states()

        def forward_backward(micro_batches: list[list[Sample]]) -> torch.Tensor:
            if self.graphs:
                scaler = self.accelerator.scaler
                scale = scaler.scale(torch.ones((), device=self.args.device)) if scaler else None
                return self.graphs.forward_backward(micro_batches, num_labels, scale)
            step_loss = torch.zeros((), device=self.args.device)
            for number, micro_batch in enumerate(micro_batches, 1):
                last = number == len(micro_batches)  # DDP averages the gradients in its backward pass
                with (
                    contextlib.nullcontext() if last else self.accelerator.no_sync(model),
                    self.compute_loss_context_manager(),
                ):
                    if self.dropout_seed is not None:
                        draw_seed(self.dropout_seed)
                    loss = model(**self.model_inputs(micro_batch), num_items_in_batch=num_labels).loss
                    self.accelerator.backward(loss)
                step_loss += loss.detach()
            return step_loss

        def undo():
            model.zero_grad()
            set_random_states(random_state)

        loss = self.run_micro_batches(inputs.samples, forward_backward, undo)
        self.tokens_since_log += inputs.num_tokens
        learning_rate = self._get_learning_rate()
        self.step_check.steps.append(Step(self.state.global_step + 1, learning_rate, inputs.source_rows, loss))
        return loss

    def run_micro_batches(
        self,
        samples: list[Sample],
        run: Callable[[list[list[Sample]]], Result],
        undo: Callable[[], None] = lambda: None,
    ) -> Result:
        """The result of `run` on micro-batches.

        After an out-of-memory error graphs are recorded anew: those of earlier steps may hold the memory that is
        missing. If there are none, or it does not help for long, micro-batches become smaller, and stay so.

        Args:
            samples: to be split into micro-batches.
            run: computes the result from the micro-batches.
            undo: removes what a failed attempt left behind.
        """
        while True:
            micro_batches = self.split(samples)
            since = self.state.global_step - self.forgot_graphs_at
            has_old_graphs = self.graphs is not None and bool(self.graphs.graphs)
            try:
                return run(micro_batches)
            except torch.OutOfMemoryError as error:
                reason = str(error).split(". ")[0]
            # Outside the handler, in which the error's traceback still refers to the tensors of the attempt.
            self.free_memory()
            if has_old_graphs and since >= STEPS_TO_RECORD_ANEW:
                self.forgot_graphs_at = self.state.global_step
                logger.info("%s after %d steps: recording CUDA graphs anew", reason, self.state.global_step)
            else:
                self.shrink_micro_batches(micro_batches, reason)
            undo()

    def free_memory(self):
        """Drops the graphs, and gives the GPU what PyTorch holds without need."""
        gc.collect()
        if self.graphs:
            self.graphs.forget()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def shrink_micro_batches(self, micro_batches: list[list[Sample]], reason: str):
        """Halves the most tokens of a micro-batch.

        Args:
            micro_batches: those that ran out of memory.
            reason: the first sentence of the error.
        Raises:
            TrainingStopped: the micro-batches are single samples, or other processes wait for this one's gradients.
        """
        divisible = (micro_batch for micro_batch in micro_batches if len(micro_batch) > 1)
        largest = max(divisible, key=count_tokens, default=None)
        if largest is None or (self.model.training and self.args.world_size > 1):
            tokens = max(map(count_tokens, micro_batches))
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
        """See `Trainer._get_grad_norm`; the norm is checked later."""
        norm = super()._get_grad_norm(model, grad_norm)
        self.step_check.steps[-1].gradient_norm = norm
        return norm

    def get_batch_samples(
        self, epoch_iterator, num_batches: int, device: torch.device
    ) -> tuple[list[StepBatch], None]:
        """The next step's batch; its labels are counted in `training_step`."""
        if self.state.global_step >= self.state.max_steps:
            return [], None  # resumed from the last checkpoint: the Trainer would train one step too many
        return list(itertools.islice(epoch_iterator, num_batches)), None

    def count_labels(self, inputs: StepBatch) -> int | torch.Tensor:
        """Label tokens of a step: the mean over all processes, since DDP averages gradients.

        Raises:
            TrainingStopped: there are none.
        """
        count = count_labels(inputs.samples)
        if count == 0:
            raise TrainingStopped(
                f"step {self.state.global_step + 1} has no label tokens. {name_rows(inputs.source_rows)}"
            )
        if self.args.world_size > 1:
            counts = self.accelerator.gather(torch.tensor([count], device=self.args.device))
            return counts.sum() / self.args.world_size
        return count

    def floating_point_ops(self, inputs: StepBatch) -> int:
        """Operations of a step."""
        return self.model.config.training_flops(inputs.num_tokens, count_labels(inputs.samples))

    def log(self, logs: dict[str, float], start_time: float | None = None):
        """Checks the steps since the last log; adds the tokens per second since then and the peak of GPU memory.

        Raises:
            TrainingStopped: see `StepCheck.check`.
        """
        if "train_loss" in logs and not self.has_trained:
            return  # a run that resumed at its end: there is nothing to sum up
        self.step_check.check()
        now = time.perf_counter()
        if "loss" in logs:
            logs["tokens_per_second"] = round(self.args.world_size * self.tokens_since_log / (now - self.log_started))
            if torch.cuda.is_available():
                logs["peak_memory_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 2)
            self.tokens_since_log, self.log_started = 0, now
        super().log(logs, start_time)

    @torch.no_grad()
    @torch.random.fork_rng(devices=[])  # the loader draws a number; training must not depend on evaluations
    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only=None,
        ignore_keys=None,
        metric_key_prefix="eval",
    ) -> EvalLoopOutput:
        """The mean loss over all label tokens; logits are not stored."""
        started = time.perf_counter()
        model = self.accelerator.unwrap_model(self.model).eval()
        num_samples = self.num_examples(dataloader)
        self.callback_handler.eval_dataloader = dataloader  # the progress bar's length
        totals = torch.zeros(2, dtype=torch.float64, device=self.args.device)

        def loss_and_labels(micro_batches: list[list[Sample]]) -> torch.Tensor:
            sums = torch.zeros_like(totals)
            if self.graphs:
                sums[0] = self.graphs.loss(micro_batches, divisor=1)
                sums[1] = sum(map(count_labels, micro_batches))
                return sums
            for micro_batch in micro_batches:
                with self.compute_loss_context_manager():
                    sums[0] += model(**self.model_inputs(micro_batch), num_items_in_batch=1).loss
                sums[1] += count_labels(micro_batch)
            return sums

        for number, batch in enumerate(dataloader):
            turn = number * self.args.world_size + self.args.process_index
            samples = own_samples(batch.samples, turn, self.args.eval_batch_size, num_samples)
            if samples:
                totals += self.run_micro_batches(samples, loss_and_labels)
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        loss_sum, labels = self.accelerator.reduce(totals).tolist()
        self.log_started += time.perf_counter() - started
        if not labels or not math.isfinite(loss_sum):
            stop_all_processes(
                f"the evaluation after step {self.state.global_step} has no loss: its sum is {loss_sum} over "
                f"{labels:.0f} label tokens."
            )
        metrics = {f"{metric_key_prefix}_loss": loss_sum / labels}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=num_samples)

    def _get_output_dir(self, trial) -> str:
        """The folder in which the Trainer writes checkpoints, and deletes some: the staging folder."""
        return str(Path(self.args.output_dir) / STAGING)

    def _save_checkpoint(self, model: torch.nn.Module, trial):
        """Writes a checkpoint into the staging folder and publishes it when it is complete."""
        output_dir, name = Path(self.args.output_dir), f"checkpoint-{self.state.global_step}"
        with staging_dir(output_dir, owner=self.args.should_save) as staging:
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.state.best_model_checkpoint == str(staging / name):  # the Trainer has the staging folder
                self.state.best_model_checkpoint = str(output_dir / name)
            if self.args.should_save:
                check_saved_adapter(self.model, staging / name, output_dir / name)
                self.state.save_to_json(str(staging / name / "trainer_state.json"))
                write_json(staging / name / RUN_FILE, self.run)
                publish_folder(staging / name, output_dir / name, replaced=staging / "replaced")
                delete_old_checkpoints(output_dir / name, self.args.save_total_limit, self.state.best_model_checkpoint)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        """Writes adapter, tokenizer and the log of the run, and publishes them when they are complete."""
        if _internal_call:
            return super().save_model(output_dir, _internal_call=True)
        target = Path(output_dir or self.args.output_dir)
        with self.stop.signals_handled(), staging_dir(target, owner=self.args.should_save) as staging:
            super().save_model(str(staging), _internal_call=True)
            if self.args.should_save:
                check_saved_adapter(self.model, staging, target)
                self.state.save_to_json(str(staging / "trainer_state.json"))
                publish_files(staging, target)
        # No process may exit before the adapter is published. Also, gloo's threads release tensors after a collective
        # operation, and abort if the interpreter is being finalized.
        self.accelerator.wait_for_everyone()

    def push_to_hub(self, commit_message: str = "The adapter") -> None:
        """Uploads the adapter as `save_model` wrote it, with tokenizer, model card and loss curves.

        Nothing else in the folder is uploaded: checkpoints are large, and training_args.bin has this machine's paths.

        Raises:
            TrainingStopped: the upload failed.
        """
        try:
            HfApi().upload_folder(
                repo_id=self.hub_model_id,
                folder_path=self.args.output_dir,
                allow_patterns=list(UPLOADED),
                commit_message=commit_message,
                revision=self.args.hub_revision,
            )
        except Exception as error:  # of the network, in the classes of another library: the adapter is saved anyway
            raise TrainingStopped(
                f"the adapter is in {self.args.output_dir}, but its upload to {self.hub_model_id} failed: {error}"
            ) from error
