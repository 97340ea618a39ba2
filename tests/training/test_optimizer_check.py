"""qlora/training/optimizer_check.py: what it lets pass; test_preflight.py has what it refuses."""

import pytest
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
    ],
)
def test_optimizers_and_schedules_that_can_be_made(tmp_path, optim, schedule):
    schedule = schedule | ({"optim_args": "momentum=0.9, nesterov=true"} if optim == "sgd" else {})
    args = TrainingArguments(output_dir=str(tmp_path / "out"), optim=optim, use_cpu=True, report_to="none", **schedule)
    check_optimizer("args.json", args, 12)
    assert not (tmp_path / "out").exists()
