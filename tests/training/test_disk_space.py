"""qlora/training/disk_space.py: its numbers of steps, evaluations and checkpoints are those of the Trainer."""

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from qlora.training.disk_space import LOG_BYTES, STATE_BYTES, RunCounts, count_steps, disk_needed
from qlora.training.trainer import LogBeforeSaving


@pytest.mark.parametrize(
    ("changes", "checkpoints"),
    [
        ({"save_strategy": "no"}, 0),
        ({}, 6),
        ({"save_total_limit": 2}, 3),
        ({"save_total_limit": 1}, 2),
        ({"save_total_limit": 9}, 6),
        ({"save_total_limit": -1}, 6),
        ({"save_only_model": True}, 6),
        # The best and the newest one are kept, and a third one is being written.
        ({"save_total_limit": 1, "metric_for_best_model": "loss"}, 3),
    ],
)
def test_disk_has_room_for_all_checkpoints_that_exist_at_once(tmp_path, changes, checkpoints):
    args = TrainingArguments(output_dir=str(tmp_path), save_steps=2, report_to="none", use_cpu=True, **changes)
    counts = RunCounts(steps=12, evaluations=3, saves=6 if args.save_strategy == "steps" else 0, logs=4)
    folder = STATE_BYTES + 4 * LOG_BYTES + 4 * 1000 + 50  # an adapter in fp32
    optimizer = 0 if args.save_only_model else 3 * 4 * 1000
    needed = checkpoints * (folder + optimizer) + folder  # the last one is the result
    assert disk_needed(args, counts, trainable=1000, tokenizer=50) == needed


def test_every_evaluation_may_find_a_better_checkpoint(tmp_path):
    best = {"save_strategy": "best", "metric_for_best_model": "loss", "eval_strategy": "epoch"}
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True, **best)
    assert count_steps(args, 37)[1:3] == (3, 3)


def test_step_takes_samples_of_all_processes(tmp_path, monkeypatch):
    sizes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_train_epochs": 1}
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none", dataloader_drop_last=True, **sizes)
    assert count_steps(args, 8).steps == count_steps(args, 15).steps == 1
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    assert count_steps(args, 32).steps == 2
    with pytest.raises(ValueError, match="a step takes 16 samples, there are 15"):
        count_steps(args, 15)


class Line(torch.nn.Module):
    """A model with one weight."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> dict:
        return {"loss": (self.weight * x).square().mean()}


class Counter(TrainerCallback):
    """Counts steps, evaluations and checkpoints of a Trainer."""

    steps = evaluations = saves = logs = 0

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += 1

    def on_evaluate(self, args, state, control, **kwargs):
        self.evaluations += 1

    def on_save(self, args, state, control, **kwargs):
        self.saves += 1

    def on_log(self, args, state, control, **kwargs):
        self.logs += 1


@pytest.mark.parametrize(
    "settings",
    [
        {"num_train_epochs": 3},
        {"num_train_epochs": 1.5, "save_steps": 0.3, "eval_steps": 0.2},
        {"max_steps": 7, "save_steps": 3, "eval_steps": 2},
        {"save_strategy": "epoch", "eval_strategy": "epoch", "num_train_epochs": 2.5},
        {"save_strategy": "no", "eval_strategy": "no"},
        {"eval_on_start": True, "eval_steps": 100, "eval_delay": 2, "dataloader_drop_last": True},
        {"save_steps": 100, "per_device_train_batch_size": 64},
        {"logging_strategy": "epoch", "num_train_epochs": 3, "save_steps": 4},
        {"logging_steps": 2, "logging_first_step": True, "save_strategy": "no"},
    ],
)
def test_counted_steps_are_those_of_the_trainer(tmp_path, settings):
    defaults = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "save_steps": 2, "eval_steps": 2}
    defaults |= {"eval_strategy": "steps", "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    args = TrainingArguments(output_dir=str(tmp_path), **defaults | settings)
    rows = [{"x": torch.ones(1)}] * 37
    # As in `QLoRATrainer`, a batch has all samples of a step.
    size = args.per_device_train_batch_size * args.gradient_accumulation_steps
    step_args = TrainingArguments(
        **args.to_dict() | {"per_device_train_batch_size": size, "gradient_accumulation_steps": 1}
    )
    counter = Counter()
    Trainer(Line(), step_args, train_dataset=rows, eval_dataset=rows, callbacks=[LogBeforeSaving(), counter]).train()
    assert count_steps(args, len(rows)) == RunCounts(counter.steps, counter.evaluations, counter.saves, counter.logs)
