"""Every check that can be made before the model is loaded; all problems are collected and reported at once.

`run_preflight` returns a `Preflight`, which carries what was found, so that the run itself checks nothing again.
"""

import contextlib
import dataclasses
import math
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizer,
    Trainer,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import DefaultFlowCallback

from chatglm import ChatGLMConfig
from glm_kernels import kernels_supported
from qlora.arguments import FinetuneArguments
from qlora.checkpoint import TOKENIZER_FILES, check_checkpoint
from qlora.data.dataset import SampleEncoder, load_rows, load_samples, mix_samples, numpy_column
from qlora.errors import is_main_process
from qlora.loading import (
    BITS_PER_QUANTIZED_WEIGHT,
    add_lora,
    check_bitsandbytes,
    check_compiler,
    check_device,
    choose_compute_dtype,
    load_tokenizer,
)
from qlora.training.checkpoints import check_output_dir, check_same_adapter, find_checkpoint
from qlora.training.memory_plan import MemoryPlan, Sizes, choose_plan, longest_step, memory_budget, plan_without_gpu
from qlora.training.training_args import TrainingSetup, read_training_args, samples_per_step

ADAPTER_BYTES = 4  # of a trained parameter in a saved adapter, fp32
OPTIMIZER_BYTES = 8  # of a trained parameter in a saved optimizer: the two moments of Adam, fp32
STATE_BYTES = 2**20  # of the other files of a checkpoint: log, schedule, states of the random generators


class Steps(NamedTuple):
    """Numbers of optimizer steps, evaluations and checkpoints of a run."""

    steps: int
    evaluations: int
    saves: int


class DiskSpace(NamedTuple):
    """Bytes that a run writes to its output_dir, and bytes that are free there."""

    needed: int
    free: int


@dataclass
class Preflight:
    """What is known of a run before its model is loaded; what could not be found out is None.

    Attributes:
        args: the flags.
        setup: TrainingArguments, compute dtype and the JSON's activation checkpointing.
        resume_from: the checkpoint to resume from; None for a new run.
        config: of the model, whose folder is complete.
        tokenizer: of the model.
        train_samples, eval_samples: tokenized; `eval_samples` is None for no evaluation, too.
        bitsandbytes_works: on the GPU.
        trainable: parameters of the adapter.
        plan: the memory plan; None for the plain path, too.
        steps: numbers of steps, evaluations and checkpoints.
        disk: bytes needed and free.
        problems: everything that is wrong, a sentence each.
    """

    args: FinetuneArguments
    setup: TrainingSetup | None = None
    resume_from: str | None = None
    config: ChatGLMConfig | None = None
    tokenizer: PreTrainedTokenizer | None = None
    train_samples: Dataset | None = None
    eval_samples: Dataset | None = None
    bitsandbytes_works: bool = False
    trainable: int | None = None
    plan: MemoryPlan | None = None
    steps: Steps | None = None
    disk: DiskSpace | None = None
    problems: list[str] = field(default_factory=list)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The type of the arithmetic."""
        return self.setup.compute_dtype if self.setup else choose_compute_dtype(self.args.compute_dtype)

    def plan_table(self) -> str | None:
        """The memory plan as lines of text; None where memory is not planned."""
        if not (self.config and self.plan and self.plan.predicted_peak):
            return None
        return self.plan.table(self.config.num_layers)

    @contextlib.contextmanager
    def collect_problems(self) -> Iterator[None]:
        """Adds a user's mistake to `problems` instead of raising it, so that the next check can be made."""
        try:
            yield
        except (ValueError, OSError) as error:
            if str(error) not in self.problems:
                self.problems.append(str(error))

    def raise_problems(self):
        """ValueError with all problems, if there are any; only the main process reports them."""
        if self.problems and not is_main_process():
            raise SystemExit(1)
        if len(self.problems) == 1:
            raise ValueError(self.problems[0])
        if self.problems:
            raise ValueError("\n- ".join([f"{len(self.problems)} things are wrong:", *self.problems]))


def run_preflight(args: FinetuneArguments) -> Preflight:
    """Makes every check. The tokenized rows stay in the cache of the datasets library."""
    preflight = Preflight(args)
    with preflight.collect_problems():
        preflight.setup = read_training_args(
            args.train_args_json, args.training_args, args.compute_dtype, evaluate=args.eval_data_path is not None
        )
    with preflight.collect_problems():
        preflight.config = check_checkpoint(args.model_name_or_path)
        preflight.tokenizer = load_tokenizer(args.model_name_or_path)
    check_rows(preflight)  # before the GPU is used: its processes are forked from this one
    check_gpu(preflight)
    if preflight.config:
        check_memory(preflight, preflight.config)
    if preflight.setup:
        check_output(preflight, preflight.setup.training_args)
    return preflight


def check_gpu(preflight: Preflight):
    """Checks that the GPU is there and large enough, and that the libraries work on it."""
    config = preflight.config or ChatGLMConfig()  # where no model can be read: the 6B one was meant
    with preflight.collect_problems():
        check_device(config, preflight.compute_dtype)
    if torch.cuda.is_available():
        with preflight.collect_problems():
            check_compiler()
        with preflight.collect_problems():
            check_bitsandbytes()
            preflight.bitsandbytes_works = True


def check_rows(preflight: Preflight):
    """Reads every data file, and tokenizes it if there is a tokenizer."""
    args, setup, tokenizer = preflight.args, preflight.setup, preflight.tokenizer
    files = args.train_files()
    paths = [path for path, _ in files] + ([args.eval_data_path] if args.eval_data_path else [])
    loaded: dict[str, Dataset] = {}
    encoder = SampleEncoder(tokenizer, args.prompt_text, args.max_input_length, args.max_output_length)
    with setup.training_args.main_process_first(desc="tokenizing") if setup else contextlib.nullcontext():
        for path in dict.fromkeys(paths):
            with preflight.collect_problems():
                if tokenizer:
                    loaded[path] = load_samples(path, encoder)
                else:
                    load_rows(path)
    if all(path in loaded for path, _ in files):
        with preflight.collect_problems():
            seed = setup.training_args.seed if setup else 0
            preflight.train_samples = mix_samples([(path, loaded[path], weight) for path, weight in files], seed)
    if args.eval_data_path:
        preflight.eval_samples = loaded.get(args.eval_data_path)


def check_memory(preflight: Preflight, config: ChatGLMConfig):
    """Finds the adapter's size and the memory plan, from a model without weights."""
    args, setup = preflight.args, preflight.setup
    with preflight.collect_problems():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=preflight.compute_dtype)
            model = add_lora(model, args.lora_rank, args.lora_alpha, args.lora_dropout, args.lora_target_modules)
        preflight.trainable = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
        fixed = args.fixed_plan(setup.recompute if setup else None, config.num_layers)
        if args.plain:
            return
        if not torch.cuda.is_available() and not args.memory_budget:
            preflight.plan = plan_without_gpu(fixed)
            return
        budget = memory_budget(args.memory_budget)
        if setup and preflight.train_samples:
            unquantized = sum(weight.nbytes for weight in model.parameters())
            lengths = numpy_column(preflight.train_samples, "length").tolist()
            sizes = model_sizes(preflight, config, unquantized)
            step_tokens = longest_step(lengths, samples_per_step(setup.training_args))
            plan = choose_plan(sizes, step_tokens, max(lengths), budget, fixed)
            preflight.plan = dataclasses.replace(plan, budget=budget if args.memory_budget else None)


def model_sizes(preflight: Preflight, config: ChatGLMConfig, unquantized: int) -> Sizes:
    """What the memory plan needs to know.

    Args:
        preflight: with the number of trained parameters.
        config: of the model.
        unquantized: bytes of the model in its compute dtype, with the adapter.
    """
    dtype = preflight.compute_dtype
    quantized_weights = config.num_layers * config.weights_per_layer
    resident = int(unquantized - quantized_weights * (dtype.itemsize - BITS_PER_QUANTIZED_WEIGHT / 8))
    return Sizes(
        config,
        dtype.itemsize,
        resident,
        preflight.trainable or 0,
        frozenset(preflight.args.lora_target_modules),
        preflight.args.lora_rank,
        preflight.setup.training_args.world_size if preflight.setup else 1,
        attention_kernels_supported(dtype),
    )


def attention_kernels_supported(dtype: torch.dtype) -> bool:
    """Whether the GPU can run the attention kernels in this dtype."""
    return kernels_supported(torch.empty(0, dtype=dtype, device="cuda"))


def check_output(preflight: Preflight, training_args: TrainingArguments):
    """Checks the checkpoint to resume from and the output_dir: it is free, it is writable, it has room."""
    args = preflight.args
    with preflight.collect_problems():
        preflight.resume_from = find_checkpoint(args.resume_from_checkpoint, training_args.output_dir)
        if preflight.resume_from:
            check_same_adapter(preflight.resume_from, args.lora_rank, args.lora_alpha, args.lora_target_modules)
        check_output_dir(training_args.output_dir, preflight.resume_from)
    with preflight.collect_problems():
        if preflight.train_samples:
            preflight.steps = count_steps(training_args, len(preflight.train_samples))
    with preflight.collect_problems():
        check_optimizer(args.train_args_json, training_args, preflight.steps.steps if preflight.steps else 1)
    with preflight.collect_problems():
        check_disk(preflight, training_args)


def check_optimizer(path: str, args: TrainingArguments, steps: int):
    """Builds the optimizer and the learning rate schedule for a model of one matrix, and takes two steps.

    Args:
        path: the JSON file, for the message.
        args: the JSON's values.
        steps: optimizer steps of the run.
    Raises:
        ValueError: a value or a combination that the optimizer or the schedule refuses, or a package that is missing.
    """
    weight = torch.nn.Parameter(torch.zeros(8, 8, device=args.device))
    model = torch.nn.Module()
    model.register_parameter("weight", weight)
    nothing_else = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False, "report_to": "none"}
    try:
        with tempfile.TemporaryDirectory() as scratch:
            trainer = Trainer(model, dataclasses.replace(args, output_dir=scratch, push_to_hub=False, **nothing_else))
            trainer.create_optimizer_and_scheduler(steps)
            for _ in range(2):
                weight.grad = torch.ones_like(weight)
                trainer.optimizer.step()
                trainer.lr_scheduler.step()
    except (ArithmeticError, AssertionError, ImportError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).strip().split("\n")[0].removesuffix(".")
        names = f"optim {args.optim.value} with lr_scheduler_type {args.lr_scheduler_type.value}"
        raise ValueError(f"{path}: {names} cannot be used: {reason}.") from error


def check_disk(preflight: Preflight, training_args: TrainingArguments):
    """ValueError unless output_dir can be written to and there is room for everything that the run will write."""
    output_dir = training_args.output_dir
    folder = existing_parent(Path(output_dir))
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"output_dir {output_dir}: {folder} cannot be written to ({error.strerror}).") from error
    if preflight.steps and preflight.trainable:
        model_folder = Path(preflight.args.model_name_or_path)
        tokenizer = sum((model_folder / name).stat().st_size for name in TOKENIZER_FILES)
        needed = disk_needed(training_args, preflight.steps.saves, preflight.trainable, tokenizer)
        free = shutil.disk_usage(folder).free
        preflight.disk = DiskSpace(needed, free)
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


def disk_needed(args: TrainingArguments, saves: int, trainable: int, tokenizer: int) -> int:
    """Bytes of the checkpoints that exist at once, and of the adapter at the end.

    Args:
        args: of the run.
        saves: number of checkpoints that are written.
        trainable: parameters of the adapter.
        tokenizer: bytes of the tokenizer's files, which each checkpoint has.
    """
    adapter = trainable * ADAPTER_BYTES + tokenizer
    limit = args.save_total_limit
    checkpoints = min(saves, limit + 1) if limit else saves  # an old one is deleted after the new one is written
    optimizer = 0 if args.save_only_model else trainable * OPTIMIZER_BYTES
    return checkpoints * (adapter + optimizer + STATE_BYTES) + adapter
