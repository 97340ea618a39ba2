"""qlora/training/optimizer_check.py: what it lets pass; test_preflight.py has most of what it refuses."""

import pytest
import torch
from transformers import TrainingArguments

from qlora.training.optimizer_check import check_optimizer


@pytest.mark.parametrize(
    "optim", ["adamw_torch", "adamw_torch_fused", "sgd", "adafactor", "adamw_8bit", "paged_adamw_8bit"]
)
@pytest.mark.parametrize(
    "schedule",
    [
        {"lr_scheduler_type": "cosine", "warmup_steps": 3},
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-5}},
        {"lr_scheduler_type": "constant"},
        {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch", "save_strategy": "epoch"},
        {"lr_scheduler_type": "greedy", "eval_strategy": "epoch", "save_strategy": "epoch"},
    ],
)
def test_optimizers_and_schedules_that_can_be_made(tmp_path, optim, schedule):
    schedule = schedule | ({"optim_args": "momentum=0.9, nesterov=true"} if optim == "sgd" else {})
    args = TrainingArguments(output_dir=str(tmp_path / "out"), optim=optim, use_cpu=True, report_to="none", **schedule)
    check_optimizer("args.json", args, 12)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("schedule", "reason"),
    [
        ({"lr_scheduler_type": "inverse_sqrt", "lr_scheduler_kwargs": {"timescale": 0}}, "division by zero"),
        (
            {
                "lr_scheduler_type": "warmup_stable_decay",
                "lr_scheduler_kwargs": {"num_decay_steps": 2, "num_cycles": "x"},
            },
            "could not convert string to float",
        ),
    ],
)
def test_schedule_that_cannot_compute_later_steps(tmp_path, schedule, reason):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", warmup_steps=50, **schedule)
    with pytest.raises(ValueError, match=reason):
        check_optimizer("args.json", args, 1000)


def test_optimizer_that_cannot_take_a_step(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise NotImplementedError("no kernel.")

    monkeypatch.setattr(torch.optim.AdamW, "step", fail)
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match=r"cannot be used: no kernel\.$"):
        check_optimizer("args.json", args, 12)


def test_settings_of_other_things_have_no_effect(tmp_path):
    evaluations = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "load_best_model_at_end": True}
    others = evaluations | {"push_to_hub": True, "hub_model_id": "me/x", "report_to": "wandb"}  # not installed
    check_optimizer("args.json", TrainingArguments(output_dir=str(tmp_path / "out"), use_cpu=True, **others), 12)
    assert not (tmp_path / "out").exists()
