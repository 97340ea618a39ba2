"""The HF Trainer, with one optimizer step's samples in one batch that is split to suit the GPU.

`per_device_train_batch_size x gradient_accumulation_steps` fixes the mathematics: the loss of a step is the mean over
all label tokens of these samples. How many of them go through the GPU at once changes nothing but time and memory.
"""

import contextlib
import dataclasses
import itertools
import logging
import os
import time
from dataclasses import dataclass

import torch
from accelerate.utils import AutocastKwargs
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput, get_last_checkpoint

from qlora.collation import ConcatenatingCollator, PaddingCollator
from qlora.data import IGNORE_INDEX

logger = logging.getLogger(__name__)


@dataclass
class Samples:
    """The samples of one step. Not a list, so that the libraries on the way leave it as it is."""

    items: list[dict]

    @property
    def num_tokens(self) -> int:
        """Tokens of all samples, prompts and answers."""
        return sum(len(item["input_ids"]) for item in self.items)


def label_count(samples: list[dict]) -> int:
    """Label tokens of samples."""
    return sum(int((torch.as_tensor(sample["labels"]) != IGNORE_INDEX).sum()) for sample in samples)


def split_evenly(samples: list[dict], max_tokens: int) -> list[list[dict]]:
    """Splits samples into as few groups of at most `max_tokens` tokens as a greedy division finds, about equally long.

    A sample that is longer than `max_tokens` has a group to itself.
    """
    by_length = sorted(samples, key=lambda sample: len(sample["input_ids"]), reverse=True)
    total = sum(len(sample["input_ids"]) for sample in samples)
    for count in range(min(len(samples), -(-total // max_tokens)), len(samples) + 1):
        groups, sizes = [[] for _ in range(count)], [0] * count
        for sample in by_length:
            smallest = sizes.index(min(sizes))
            groups[smallest].append(sample)
            sizes[smallest] += len(sample["input_ids"])
        if max(sizes) <= max_tokens or count == len(samples):
            break
    return [group for group in groups if group]


def find_checkpoint(requested: str | None, output_dir: str) -> str | None:
    """The checkpoint to resume from: the given folder, or the newest in `output_dir` for 'last'."""
    if requested is None:
        return None
    found = get_last_checkpoint(output_dir) if requested == "last" and os.path.isdir(output_dir) else requested
    if found is None or not os.path.isfile(os.path.join(found, "trainer_state.json")):
        raise FileNotFoundError(
            f"--resume_from_checkpoint {requested}: there is no checkpoint (a folder with trainer_state.json) in "
            f"{output_dir if requested == 'last' else requested}."
        )
    return found


class QLoRATrainer(Trainer):
    """Trains on whole optimizer steps and evaluates by the token.

    Args:
        args: TrainingArguments as the JSON gave them.
        max_tokens: most tokens that go through the model at once; None for the plain way, which is to take the
            batches as the JSON has them, a padded row for each sample.
        kwargs: anything the Trainer takes; datasets have `input_ids` and `labels`.
    """

    def __init__(self, model, args: TrainingArguments, max_tokens: int | None, **kwargs):
        step_args = dataclasses.replace(
            args,
            per_device_train_batch_size=args.per_device_train_batch_size * args.gradient_accumulation_steps,
            gradient_accumulation_steps=1,
        )
        if step_args.n_gpu > 1:  # without torchrun one process trains on one GPU, whatever else is visible
            step_args._n_gpu = 1
        super().__init__(model=model, args=step_args, data_collator=Samples, **kwargs)
        # The model is in its compute type already; of mixed precision only the loss scaling is wanted.
        self.accelerator.autocast_handler = AutocastKwargs(enabled=False)
        self.max_tokens, self.plain_rows = max_tokens, args.per_device_train_batch_size
        self.collate = (ConcatenatingCollator if max_tokens else PaddingCollator)(self.model.config)
        self.tokens_since_log, self.log_started = 0, time.perf_counter()

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

    def training_step(self, model: torch.nn.Module, inputs: Samples, num_items_in_batch=None) -> torch.Tensor:
        """Forward and backward for all samples of an optimizer step, a group at a time."""
        model.train()
        self.tokens_since_log += inputs.num_tokens
        groups = self.split(inputs.items)
        num_labels = self.count_labels(inputs.items)
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

    def get_batch_samples(self, epoch_iterator, num_batches: int, device: torch.device) -> tuple[list[Samples], None]:
        """The next step's batch; its labels are counted in `training_step`."""
        return list(itertools.islice(epoch_iterator, num_batches)), None

    def count_labels(self, samples: list[dict]) -> int | torch.Tensor:
        """Label tokens of a step, over all processes; DDP averages gradients, so the mean over processes."""
        count = label_count(samples)
        if self.args.world_size > 1:
            counts = self.accelerator.gather(torch.tensor([count], device=self.args.device))
            return counts.sum() / self.args.world_size
        return count

    def floating_point_ops(self, inputs: Samples) -> int:
        """Forward pass and gradient of the activations: 4 operations for each token and weight."""
        return 4 * self.model.config.multiplied_weights * inputs.num_tokens

    def log(self, logs: dict[str, float], start_time: float | None = None):
        """Adds the speed since the last log, evaluations not counted, and the peak of allocated GPU memory."""
        now = time.perf_counter()
        if "loss" in logs:
            logs["tokens_per_second"] = round(self.args.world_size * self.tokens_since_log / (now - self.log_started))
            if torch.cuda.is_available():
                logs["peak_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
            self.tokens_since_log, self.log_started = 0, now
        super().log(logs, start_time)

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
        totals = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        for batch in dataloader:
            for group in self.split(batch.items):
                with torch.no_grad(), self.compute_loss_context_manager():
                    loss = model(**self.micro_batch(group), num_items_in_batch=1).loss
                totals[0] += loss
                totals[1] += label_count(group)
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        loss_sum, labels = self.accelerator.reduce(totals).tolist()
        self.log_started += time.perf_counter() - started
        metrics = {f"{metric_key_prefix}_loss": loss_sum / labels}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=len(dataloader.dataset))
