"""What can be known of a run before its model is loaded: all of it is checked, and all that is wrong said at once."""

import contextlib
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedTokenizer, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import DefaultFlowCallback

from chatglm import ChatGLMConfig
from glm_kernels import kernels_supported
from qlora.arguments import FinetuneArguments, choose_compute_dtype
from qlora.checkpoint import TOKENIZER_FILES, check_checkpoint
from qlora.data.dataset import SampleEncoder, load_rows, load_samples, mix_samples, numpy_column
from qlora.loading import (
    BITS_PER_QUANTIZED_WEIGHT,
    add_lora,
    check_bitsandbytes,
    check_compiler,
    check_device,
    load_tokenizer,
)
from qlora.training.memory_plan import Sizes, memory_budget, plan_and_table
from qlora.training.saving import check_output_dir, check_same_adapter, find_checkpoint
from qlora.training.training_args import TrainingSetup, read_training_args, samples_per_step

ADAPTER_BYTES = 4  # for each trained parameter, fp32
STATE_BYTES = 2**20  # of a checkpoint: the log, the schedule, the state of the random numbers
OPTIMIZER_BYTES = 8  # the two moments of Adam, fp32: as much as a common optimizer keeps


class Steps(NamedTuple):
    """How often a run does what."""

    steps: int
    evaluations: int
    saves: int


class DiskSpace(NamedTuple):
    """Bytes that a run writes to its output_dir, and bytes that are free there."""

    needed: int
    free: int


@dataclass
class Preflight:
    """A run as far as it can be known before its model is loaded; what could not be read is None."""

    args: FinetuneArguments
    setup: TrainingSetup | None = None
    resume_from: str | None = None
    config: ChatGLMConfig | None = None
    tokenizer: PreTrainedTokenizer | None = None
    train_samples: Dataset | None = None
    eval_samples: Dataset | None = None
    bitsandbytes_works: bool = False  # on the GPU
    trainable: int | None = None  # parameters of the adapter
    plan: str | None = None  # the memory plan; None also without a GPU, and for the plain path
    steps: Steps | None = None
    disk: DiskSpace | None = None
    problems: list[str] = field(default_factory=list)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The type of the arithmetic."""
        return self.setup.compute_dtype if self.setup else choose_compute_dtype(self.args.compute_dtype, {})

    @contextlib.contextmanager
    def noting_problems(self) -> Iterator[None]:
        """Notes a user's mistake instead of raising it, so that the next check can be made."""
        try:
            yield
        except (ValueError, OSError) as error:
            if str(error) not in self.problems:
                self.problems.append(str(error))

    def raise_problems(self):
        """ValueError with all that is wrong, if anything is; only the main process says it."""
        if self.problems and os.environ.get("RANK", "0") != "0":
            raise SystemExit(1)
        if len(self.problems) == 1:
            raise ValueError(self.problems[0])
        if self.problems:
            raise ValueError("\n- ".join([f"{len(self.problems)} things are wrong:", *self.problems]))


def run_preflight(args: FinetuneArguments) -> Preflight:
    """Makes every check; what is wrong stands in `problems`. The tokenised rows stay in the cache of datasets."""
    run = Preflight(args)
    with run.noting_problems():
        run.setup = read_training_args(
            args.train_args_json, args.seed, args.compute_dtype, evaluate=args.eval_data_path is not None
        )
    with run.noting_problems():
        run.config = check_checkpoint(args.model_name_or_path)
        run.tokenizer = load_tokenizer(args.model_name_or_path)
    check_rows(run)  # by processes that had better begin before this one uses the GPU
    check_gpu(run)
    if run.config:
        check_memory(run)
    if run.setup:
        check_output(run)
    return run


def check_gpu(run: Preflight):
    """Is the model's GPU there, large enough, and do the libraries work on it?"""
    config = run.config or ChatGLMConfig()  # where no model can be read: the 6B one was meant
    with run.noting_problems():
        check_device(config, run.compute_dtype)
    if torch.cuda.is_available():
        with run.noting_problems():
            check_compiler()
        with run.noting_problems():
            check_bitsandbytes()
            run.bitsandbytes_works = True


def check_rows(run: Preflight):
    """Every file of rows, tokenised if the tokenizer could be loaded."""
    args, files = run.args, run.args.train_files()
    encoder = SampleEncoder(run.tokenizer, args.prompt_text, args.max_input_length, args.max_output_length)
    loaded = {}
    with run.setup.training_args.main_process_first(desc="tokenizing") if run.setup else contextlib.nullcontext():
        for path in dict.fromkeys([*(path for path, _ in files), *filter(None, [args.eval_data_path])]):
            with run.noting_problems():
                loaded[path] = load_samples(path, encoder) if run.tokenizer else load_rows(path)
    if run.tokenizer and all(path in loaded for path, _ in files):
        with run.noting_problems():
            seed = run.setup.training_args.seed if run.setup else 0
            run.train_samples = mix_samples([(path, loaded[path], weight) for path, weight in files], seed)
    if run.tokenizer:
        run.eval_samples = loaded.get(args.eval_data_path)


def check_memory(run: Preflight):
    """The adapter's size and the memory plan, from a model without weights."""
    args, planned = run.args, torch.cuda.is_available() and not run.args.plain
    with run.noting_problems():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(run.config, dtype=run.compute_dtype)
            model = add_lora(model, args.lora_rank, args.lora_alpha, args.lora_dropout, args.lora_target_modules)
        run.trainable = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
        budget = memory_budget(args.memory_budget) if planned or args.memory_budget else None
        fixed = args.fixed_plan(run.setup.recompute if run.setup else None, run.config.num_layers)
        if planned and run.setup and run.train_samples:
            run.plan = plan_ahead(run, sum(weight.nbytes for weight in model.parameters()), budget, fixed)


def plan_ahead(run: Preflight, unquantized: int, budget: int, fixed: dict[str, int]) -> str:
    """The memory plan as `plan_memory` will make it when the model is loaded.

    Args:
        run: with its samples.
        unquantized: bytes of the model in its compute type, with the adapter.
        budget: bytes that may be allocated.
        fixed: fields of the plan that the user has chosen.
    Raises:
        ValueError: even the longest sample alone does not fit.
    """
    config, dtype, training_args = run.config, run.compute_dtype, run.setup.training_args
    quantized = config.num_layers * config.weights_per_layer
    resident = int(unquantized - quantized * (dtype.itemsize - BITS_PER_QUANTIZED_WEIGHT / 8))
    targets = frozenset(run.args.lora_target_modules)
    sizes = Sizes(config, dtype.itemsize, resident, run.trainable, targets, attention_kernels_supported(dtype))
    lengths = numpy_column(run.train_samples, "length").tolist()
    return plan_and_table(sizes, lengths, samples_per_step(training_args), budget, fixed)[1]


def attention_kernels_supported(dtype: torch.dtype) -> bool:
    """Whether the GPU can run the attention kernel in this type."""
    return kernels_supported(torch.empty(0, dtype=dtype, device="cuda"))


def check_output(run: Preflight):
    """Where the run writes to and goes on from: is it there, is it writable, is it large enough?"""
    training_args = run.setup.training_args
    with run.noting_problems():
        run.resume_from = find_checkpoint(run.args.resume_from_checkpoint, training_args.output_dir)
        if run.resume_from:
            check_same_adapter(run.resume_from, run.args.lora_rank, run.args.lora_alpha, run.args.lora_target_modules)
        check_output_dir(training_args.output_dir, run.resume_from)
    with run.noting_problems():
        if run.train_samples:
            run.steps = count_steps(training_args, len(run.train_samples))
    with run.noting_problems():
        check_disk(run, training_args.output_dir)


def check_disk(run: Preflight, output_dir: str):
    """ValueError unless output_dir can be written to and there is room for everything that the run will write."""
    folder = existing_parent(Path(output_dir))
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"output_dir {output_dir}: {folder} cannot be written to ({error.strerror}).") from error
    if run.steps and run.trainable:
        needed, free = disk_needed(run), shutil.disk_usage(folder).free
        run.disk = DiskSpace(needed, free)
        if needed > free:
            raise ValueError(
                f"output_dir {output_dir} needs {needed / 1e9:.2f} GB and has {free / 1e9:.2f} GB free. Make room, or "
                "set save_total_limit in the JSON."
            )


def existing_parent(path: Path) -> Path:
    """The path itself, or the nearest above it that exists."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())


def count_steps(args: TrainingArguments, num_samples: int) -> Steps:
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
    evaluations, saves = int(args.eval_on_start), 0
    for step in range(1, steps + 1):
        state.global_step, state.epoch, control = step, step / steps_per_epoch, TrainerControl()
        flow.on_step_end(args, state, control)
        evaluations, saves = evaluations + control.should_evaluate, saves + control.should_save
        if step % steps_per_epoch == 0 or step == steps:
            control = TrainerControl()
            flow.on_epoch_end(args, state, control)
            evaluations, saves = evaluations + control.should_evaluate, saves + control.should_save
    if args.save_strategy == "best":
        saves = evaluations  # at most
    return Steps(steps, evaluations, saves)


def disk_needed(run: Preflight) -> int:
    """Bytes of the checkpoints that exist at once, and of the adapter at the end."""
    args, saves, folder = run.setup.training_args, run.steps.saves, Path(run.args.model_name_or_path)
    tokenizer = sum((folder / name).stat().st_size for name in TOKENIZER_FILES)
    adapter = run.trainable * ADAPTER_BYTES + tokenizer
    kept = min(saves, args.save_total_limit + 1) if args.save_total_limit else saves  # the old one goes last
    optimizer = 0 if args.save_only_model else run.trainable * OPTIMIZER_BYTES
    return kept * (adapter + optimizer + STATE_BYTES) + adapter
