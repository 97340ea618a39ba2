"""How often a run evaluates, logs and saves, and how much disk space its files take."""

import math
from typing import NamedTuple

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import DefaultFlowCallback

from qlora.training.training_args import samples_per_step

ADAPTER_BYTES = 4  # of a trained parameter in a saved adapter, fp32
OPTIMIZER_BYTES = 12  # of a trained parameter in a saved optimizer: at most three moments (AdEMAMix), fp32
STATE_BYTES = 2**20  # of other files, each time: schedule, random generators' states, model card, loss.png, ...
LOG_BYTES = 2**10  # of an entry of the log, in trainer_state.json and for TensorBoard


class RunCounts(NamedTuple):
    """Numbers of optimizer steps, evaluations and checkpoints of a run, and of entries in its log."""

    steps: int
    evaluations: int
    saves: int
    logs: int


class DiskSpace(NamedTuple):
    """Bytes that a run writes to its output_dir, and bytes that are free there."""

    needed: int
    free: int


def count_steps(args: TrainingArguments, num_samples: int) -> RunCounts:
    """Optimizer steps, evaluations and checkpoints of a run, as the Trainer's own control flow has them.

    Raises:
        ValueError: there would be no step at all.
    """
    step_samples = samples_per_step(args) * args.world_size
    if args.dataloader_drop_last and num_samples < step_samples:
        raise ValueError(
            f"a step takes {step_samples} samples, there are {num_samples}, and dataloader_drop_last drops the "
            "last step of an epoch if it is not full: there is nothing to train. Set it to false in the JSON."
        )
    rounded = math.floor if args.dataloader_drop_last else math.ceil
    steps_per_epoch = rounded(num_samples / step_samples)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_per_epoch)
    state, flow = TrainerState(max_steps=steps), DefaultFlowCallback()
    state.compute_steps(args, steps)
    evaluations, saves, logged = int(args.eval_on_start), 0, set()
    for step in range(1, steps + 1):
        state.global_step, state.epoch = step, step / steps_per_epoch
        ends = [flow.on_step_end] + [flow.on_epoch_end] * (step % steps_per_epoch == 0 or step == steps)
        for end in ends:
            control = TrainerControl()
            end(args, state, control)
            evaluations, saves = evaluations + control.should_evaluate, saves + control.should_save
            if control.should_log or control.should_evaluate or control.should_save:
                logged.add(step)
    if args.save_strategy == "best":
        saves = evaluations  # at most
    return RunCounts(steps, evaluations, saves, len(logged) + evaluations + 1)  # 1: the summary


def disk_needed(args: TrainingArguments, counts: RunCounts, trainable: int, tokenizer: int) -> int:
    """Bytes of the checkpoints that exist at once, and of the adapter at the end, at most.

    Args:
        args: of the run.
        counts: numbers of checkpoints and of entries in the log.
        trainable: parameters of the adapter.
        tokenizer: bytes of the tokenizer's files, which each checkpoint has.
    """
    adapter = trainable * ADAPTER_BYTES + tokenizer + STATE_BYTES + counts.logs * LOG_BYTES
    optimizer = 0 if args.save_only_model else trainable * OPTIMIZER_BYTES
    limit = args.save_total_limit or 0
    if limit > 0:  # an old one is deleted after the new one is written; the best and the newest one are kept
        limit = max(limit, 2 if args.metric_for_best_model else 1) + 1
    checkpoints = min(counts.saves, limit) if limit > 0 else counts.saves
    return checkpoints * (adapter + optimizer) + adapter
