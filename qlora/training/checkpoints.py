"""Checkpoints: which of them a run may resume from, where a run may write, and the checks around writing one.

`QLoRATrainer` calls these functions; `qlora.atomic` renames files and folders to their final names.
"""

import contextlib
import json
import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import load_peft_weights
from safetensors import SafetensorError
from safetensors.torch import load_file

from qlora.arguments import LoraSettings
from qlora.atomic import lack_of_room
from qlora.checkpoint import file_problem
from qlora.errors import TrainingStopped, first_line
from qlora.training.model_card import PICTURE
from qlora.training.same_run import RUN_FILE, tensor_shapes

logger = logging.getLogger(__name__)

CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")
ADAPTER_FILE = "adapter_model.safetensors"
STAGING = "_saving"  # folder in output_dir; its name does not match `checkpoint-N`
CHECKPOINT_FILES = (
    RUN_FILE,
    "adapter_config.json",
    ADAPTER_FILE,
    "optimizer.pt",
    "scheduler.pt",
    "rng_state*.pth",  # one of each process
    "trainer_state.json",
)
SCALER = "scaler.pt"  # exists only for a run in fp16


def step_of(checkpoint: Path) -> int:
    """The step N of a folder `checkpoint-N`; -1 for any other path, also for a link, which is not followed."""
    match = CHECKPOINT_NAME.fullmatch(checkpoint.name)
    return int(match[1]) if match and checkpoint.is_dir() and not checkpoint.is_symlink() else -1


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoint folders of a run, newest first, complete or not."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if step_of(path) >= 0]
    return sorted(found, key=step_of, reverse=True)


def checkpoint_problem(checkpoint: Path) -> str | None:
    """Why a run cannot resume from a checkpoint.

    Args:
        checkpoint: the folder.
    Returns:
        What is wrong: the folder, a file or a tensor is missing, or a file is damaged or would run code. None if the
        checkpoint is complete.
    """
    if not checkpoint.is_dir():
        return "there is no such folder"
    for pattern in (*CHECKPOINT_FILES, SCALER):
        found = sorted(checkpoint.glob(pattern))
        if not found and pattern != SCALER:
            return f"{pattern} is missing"
        for path in found:
            reason = file_problem(path, check_sums=True)
            if reason:
                return f"{path.name} {reason}"
    try:
        run = json.loads((checkpoint / RUN_FILE).read_text(encoding="utf-8"))
        random_states, expected = random_state_files(run["processes"]), dict(run["adapter"])
    except (KeyError, TypeError, ValueError):
        return f"{RUN_FILE} is damaged: it has no processes or no adapter"
    missing = [name for name in random_states if not (checkpoint / name).is_file()]
    if missing:
        return f"{missing[0]} is missing, of {run['processes']} processes"
    shapes = tensor_shapes(load_file(checkpoint / ADAPTER_FILE))
    different = sorted(name for name in expected.keys() | shapes.keys() if expected.get(name) != shapes.get(name))
    if different:
        has, should_have = (named.get(different[0], "not at all") for named in (shapes, expected))
        return f"{ADAPTER_FILE} has {different[0]} {has} instead of {should_have}"
    return None


def random_state_files(processes: int) -> list[str]:
    """The names of the files in which the Trainer saves the random generators of its processes."""
    return [f"rng_state_{number}.pth" for number in range(processes)] if processes > 1 else ["rng_state.pth"]


def find_checkpoint(requested: str | None, output_dir: str) -> str | None:
    """The checkpoint to resume from; incomplete ones that are newer are logged.

    Args:
        requested: a folder, or 'last' for the newest complete one in `output_dir`; None for a new run.
        output_dir: of the run.
    Returns:
        The folder; None for a new run.
    Raises:
        FileNotFoundError: there is no complete checkpoint, or the requested folder is not one.
    """
    if requested is None:
        return None
    if requested != "last":
        reason = checkpoint_problem(Path(requested))
        if reason:
            raise FileNotFoundError(f"--resume_from_checkpoint {requested}: not a whole checkpoint: {reason}.")
        return requested
    for folder in checkpoints(output_dir):
        reason = checkpoint_problem(folder)
        if reason is None:
            logger.info("Going on from %s", folder)
            return str(folder)
        logger.warning("%s is passed over: %s", folder, reason)
    raise FileNotFoundError(
        f"--resume_from_checkpoint last: there is no whole checkpoint in {output_dir}. Start without this flag."
    )


def check_same_adapter(checkpoint: str, lora: LoraSettings):
    """Checks that the flags of a resumed run describe the adapter of its checkpoint; only the dropout may differ.

    Args:
        checkpoint: a complete checkpoint.
        lora: settings of the adapter, by the flags.
    Raises:
        ValueError: the checkpoint's adapter has other values.
    """
    config = json.loads((Path(checkpoint) / "adapter_config.json").read_text(encoding="utf-8"))
    modules = (config.get("target_modules") or [], lora.target_modules)
    values = {
        "--lora_rank": (config.get("r"), lora.rank),
        "--lora_alpha": (config.get("lora_alpha"), lora.alpha),
        "--lora_target_modules": tuple(" ".join(sorted(set(map(str, names)))) for names in modules),
    }
    different = [f"{flag} {saved} (not {given})" for flag, (saved, given) in values.items() if saved != given]
    if different:
        raise ValueError(
            f"{checkpoint} holds an adapter of {', '.join(different)}, and a run goes on with the adapter that it "
            "has. Give these values, or start another run without --resume_from_checkpoint."
        )


def trainer_state(checkpoint: str | Path) -> dict:
    """The Trainer's state in a complete checkpoint."""
    return json.loads((Path(checkpoint) / "trainer_state.json").read_text(encoding="utf-8"))


def check_steps_left(checkpoint: str, output_dir: str, steps: int):
    """Checks that a resumed run has something to do.

    Args:
        checkpoint: a complete checkpoint.
        output_dir: of the run; without an adapter in it, or its losses, the run was stopped before it saved all of its
            result.
        steps: optimizer steps of the run.
    Raises:
        ValueError: the run is finished, or ends before the checkpoint.
    """
    done = trainer_state(checkpoint)["global_step"]
    if done > steps:
        raise ValueError(f"{checkpoint} has {done} steps, and the run ends after {steps}: raise max_steps or epochs.")
    if done == steps and all((Path(output_dir) / name).exists() for name in ("adapter_config.json", PICTURE)):
        raise ValueError(
            f"the run in {output_dir} is finished: all {steps} steps are trained, and its adapter is there. To train "
            f"it further, start another run with --init_adapter {output_dir}."
        )


def best_checkpoint(checkpoint: str | Path) -> Path | None:
    """The best checkpoint up to a complete one, in the same folder, which may have been renamed; None for none."""
    best = trainer_state(checkpoint).get("best_model_checkpoint")
    return Path(checkpoint).parent / Path(best).name if best else None


def check_best_checkpoint(checkpoint: str):
    """FileNotFoundError if the best checkpoint so far, which is to be the result, is not there or not complete."""
    best = best_checkpoint(checkpoint)
    if best and (not best.is_dir() or file_problem(best / ADAPTER_FILE)):
        raise FileNotFoundError(
            f"{best}, the best checkpoint so far, is missing or damaged, and load_best_model_at_end needs it. Put it "
            "back, or resume from an earlier checkpoint."
        )


def check_output_dir(output_dir: str | Path, checkpoint: str | None):
    """Checks that a new run's folder has no earlier run, and that a resumed run's folder has no later checkpoint.

    Args:
        output_dir: of the run.
        checkpoint: the checkpoint to resume from; None for a new run.
    Raises:
        ValueError: the run would overwrite the files of a model or the results of another run, or mix with them.
    """
    if (Path(output_dir) / "config.json").exists():
        raise ValueError(
            f"output_dir {output_dir} holds a model (config.json), whose README.md and tokenizer files would be "
            "overwritten. Name another output_dir in the JSON."
        )
    found = sorted(path for path in Path(output_dir).glob("checkpoint-*") if CHECKPOINT_NAME.fullmatch(path.name))
    foreign = [path for path in found if step_of(path) < 0]
    if foreign:
        raise ValueError(f"{foreign[0]} is a file or a link, where the run may write a checkpoint. Move or rename it.")
    present = [path.name for path in checkpoints(output_dir)]
    if (Path(output_dir) / "adapter_config.json").exists():
        present.insert(0, "a finished adapter")
    if checkpoint and Path(checkpoint).resolve().parent == Path(output_dir).resolve():
        step = step_of(Path(checkpoint).resolve())
        present = [
            path.name for path in checkpoints(output_dir) if step_of(path) > step and not checkpoint_problem(path)
        ]
    if present:
        can_resume = any(not checkpoint_problem(path) for path in checkpoints(output_dir))
        resume = ", or go on with --resume_from_checkpoint last" if can_resume else ""
        raise ValueError(
            f"{output_dir} holds an earlier run ({', '.join(present[:2])}), which is not overwritten. Name another "
            f"output_dir in the JSON, move or delete this one{resume}."
        )


@contextlib.contextmanager
def staging_dir(output_dir: str | Path, owner: bool) -> Iterator[Path]:
    """A folder in `output_dir` to write into; complete results are moved out of it, and it is deleted at the end.

    Args:
        output_dir: of the run.
        owner: whether this process deletes the folder, into which all processes write.
    Raises:
        TrainingStopped: writing failed, for example because the disk is full.
    """
    staging = Path(output_dir) / STAGING
    if owner:
        shutil.rmtree(staging, ignore_errors=True)  # left by a run that was killed
    try:
        yield staging
    except Exception as error:
        reason = lack_of_room(error)
        if reason is None and not isinstance(error, (OSError, SafetensorError)):
            raise
        problem = f"{reason}. Make room" if reason else first_line(error)
        raise TrainingStopped(f"saving in {output_dir} failed: {problem}. {resume_advice(output_dir)}") from error
    finally:
        if owner:
            shutil.rmtree(staging, ignore_errors=True)


def resume_advice(output_dir: str | Path) -> str:
    """A sentence for the user: the newest complete checkpoint, and the flag that resumes from it."""
    newest = next((path for path in checkpoints(output_dir) if not checkpoint_problem(path)), None)
    if newest is None:
        has_adapter = (Path(output_dir) / "adapter_config.json").exists()
        return "The adapter is whole." if has_adapter else "There is no checkpoint yet."
    return f"{newest} is whole: go on from it with --resume_from_checkpoint last."


def delete_old_checkpoints(newest: Path, limit: int | None, best: str | None):
    """Deletes a run's oldest checkpoints, except the one just written and the best one.

    Args:
        newest: the one just written. Checkpoints of a later step belong to another run and are not deleted.
        limit: most checkpoints that may exist, `save_total_limit`; None, 0 or less for any number.
        best: the one with the lowest evaluation loss; None if the run does not determine it.
    """
    if not limit or limit < 0:
        return
    present = [path for path in checkpoints(newest.parent) if step_of(path) <= step_of(newest)]
    protected = {newest.name, Path(best).name if best else None}
    old = [path for path in reversed(present) if path.name not in protected]
    for path in old[: max(len(present) - limit, 0)]:
        shutil.rmtree(path, ignore_errors=True)


def check_saved_adapter(model: PeftModel, folder: Path, final: Path):
    """Reads a saved adapter back and compares it with the one in memory; logs a warning if it is untrained.

    Args:
        model: the model whose adapter was saved.
        folder: the present folder of the adapter.
        final: its final folder, for the messages.
    Raises:
        TrainingStopped: the two differ, or a value is not finite.
    """
    saved, trained = load_peft_weights(str(folder), device="cpu"), get_peft_model_state_dict(model)
    different = [name for name in trained if name not in saved or not torch.equal(saved[name], trained[name].cpu())]
    not_finite = [name for name, tensor in trained.items() if not tensor.isfinite().all()]
    if different or not_finite:
        found = f"{not_finite[0]} is not finite" if not_finite else f"{different[0]} was read back differently"
        raise TrainingStopped(f"the adapter cannot be trusted as it was saved for {final}: {found}.")
    if not any(tensor.any() for name, tensor in trained.items() if "lora_B" in name):
        logger.warning("The adapter in %s is untrained: every lora_B is zero.", final)
