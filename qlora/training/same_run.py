"""Whether a run goes on as it began: what defines it is written into every checkpoint and compared when it resumes."""

import hashlib
import json
from pathlib import Path

import torch
from transformers import TrainingArguments

from qlora.arguments import FinetuneArguments
from qlora.data.row_files import update_hash
from qlora.hub.repository import model_source
from qlora.training.training_args import TrainingSetup, samples_per_step

RUN_FILE = "run.json"

# What a resumed run may change, since it learns the same: fields of TrainingArguments that begin with one of these.
MAY_CHANGE = (
    "activation_checkpointing",
    "dataloader_multiprocessing_context",
    "dataloader_num_workers",
    "dataloader_persistent_workers",
    "dataloader_pin_memory",
    "dataloader_prefetch_factor",
    "ddp_",
    "debug",
    "disable_tqdm",
    "do_",
    "full_determinism",
    "gradient_checkpointing",
    "hub_",
    "local_rank",  # torchrun's, another one in each process
    "log_",
    "logging_",
    "output_dir",
    "per_device_eval_batch_size",
    "prediction_loss_only",
    "project",
    "push_to_hub",
    "remove_unused_columns",
    "report_to",
    "run_name",
    "save_",
    "skip_memory_metrics",
    "trackio_",
    "use_cpu",
)
DESCRIBED_OTHERWISE = ("bf16", "fp16", "per_device_train_batch_size", "gradient_accumulation_steps")
SAMPLE_FLAGS = ("max_input_length", "max_output_length", "prompt_text", "train_on")
LENGTH_KEYS = ("num_train_epochs", "max_steps")


def describe_run(
    args: FinetuneArguments, setup: TrainingSetup, num_samples: int, adapter: dict[str, torch.Tensor]
) -> dict:
    """What defines a run, as `run.json` has it.

    Args:
        args: the flags; their data files exist.
        setup: the settings of the JSON.
        num_samples: to train on.
        adapter: the adapter's tensors under the names of the file, without values.
    Returns:
        `settings`, name -> value; `processes`, their number; `adapter`, name of a tensor -> shape, such as "4x4096".
    """
    training_args = setup.training_args
    values = training_args.to_dict()
    values = {name: value for name, value in values.items() if not name.startswith(MAY_CHANGE + DESCRIBED_OTHERWISE)}
    if not training_args.metric_for_best_model:  # evaluations have no effect on the result
        values = {name: value for name, value in values.items() if not name.startswith("eval_")}
    elif args.eval_data_path:
        values["--eval_data_path"] = f"sha256 {digest([(args.eval_data_path, 1)])}"
    if is_constant(training_args):  # a longer or shorter run has the same steps
        values = {name: value for name, value in values.items() if name not in LENGTH_KEYS}
    elif training_args.max_steps > 0:
        del values["num_train_epochs"]
    values |= {
        "per_device_train_batch_size x gradient_accumulation_steps": samples_per_step(training_args),
        "--train_data_path": f"{num_samples} samples, sha256 {digest(args.train_files())}",
        "--compute_dtype": setup.arithmetic,
        **{f"--{name}": getattr(args, name) for name in SAMPLE_FLAGS},
        "--lora_dropout": args.lora_dropout,
    }
    if source := model_source(args.model_name_or_path):
        values["--model_name_or_path"] = f"{source['repository']}, revision {source['revision']}"
    run = {"settings": values, "processes": training_args.world_size, "adapter": tensor_shapes(adapter)}
    return json.loads(json.dumps(run))  # as it will be read back


def is_constant(training_args: TrainingArguments) -> bool:
    """Whether the learning rate of a step does not depend on the number of steps of the run."""
    schedule, warmup = training_args.lr_scheduler_type.value, training_args.warmup_steps
    return schedule == "constant" or (schedule == "constant_with_warmup" and not 0 < warmup < 1)


def digest(files: list[tuple[str, float]]) -> str:
    """The first digits of a SHA-256 of the contents of files and their weights."""
    whole = hashlib.sha256()
    for path, weight in files:
        update_hash(whole, path)
        whole.update(f"\0{weight:g}\0".encode())
    return whole.hexdigest()[:12]


def tensor_shapes(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """Name -> shape, such as "4x4096"."""
    return {name: "x".join(map(str, tensor.shape)) for name, tensor in tensors.items()}


def check_same_run(checkpoint: str, run: dict):
    """Checks that a resumed run is that of its checkpoint: the optimizer's state and the schedule belong to it.

    Args:
        checkpoint: a complete checkpoint.
        run: as `describe_run` returns it; a setting that another release of transformers does not have is left out.
    Raises:
        ValueError: a setting, the data, the number of processes or the model is another one; all are listed.
    """
    saved = json.loads((Path(checkpoint) / RUN_FILE).read_text(encoding="utf-8"))
    before, now = (described["settings"] | {"processes": described["processes"]} for described in (saved, run))
    different = [
        f"{name} {json.dumps(before[name], ensure_ascii=False)} (not {json.dumps(now[name], ensure_ascii=False)})"
        for name in now
        if name in before and before[name] != now[name]
    ]
    if not different and saved["adapter"] != run["adapter"]:
        different = ["a model of other layers or widths"]
    if different:
        raise ValueError(
            f"{checkpoint} is of a run with {', '.join(different)}, and a run goes on as it began. Restore these "
            f"values, or start another run from this adapter with --init_adapter {checkpoint}."
        )
