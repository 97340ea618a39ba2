"""Every check that can be made before the model is loaded; all problems are collected and reported at once.

`run_preflight` returns a `Preflight`, which carries what was found, so that the run itself checks nothing again.
"""

import contextlib
import dataclasses
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from peft import get_peft_model_state_dict
from transformers import AutoModelForCausalLM, TrainingArguments

from glm_shared.chat import ChatTokenizer
from glm_shared.description import ModelDescription
from qlora.adapter import adapter_settings, add_adapter, base_model_path
from qlora.arguments import FinetuneArguments, LoraSettings, copy_folder
from qlora.atomic import check_room, existing_parent
from qlora.checkpoint import check_checkpoint, check_tokenizer, is_quantized, tokenizer_files
from qlora.data.dataset import SampleEncoder, load_rows, load_samples, mix_samples, numpy_column
from qlora.data.hub_rows import is_hub_name, with_local_files
from qlora.errors import is_main_process
from qlora.hub.fetch import fetch_model, hub_name
from qlora.loading import (
    COPY_SOURCE,
    check_bitsandbytes,
    check_compiler,
    check_device,
    check_fp8,
    choose_compute_dtype,
    copy_source,
    is_copy_of,
    load_tokenizer,
    quantized_bytes,
)
from qlora.training.checkpoints import (
    check_best_checkpoint,
    check_output_dir,
    check_same_adapter,
    check_steps_left,
    find_checkpoint,
)
from qlora.training.disk_space import DiskSpace, RunCounts, count_steps, disk_needed
from qlora.training.memory_plan import (
    MemoryPlan,
    choose_plan,
    longest_step,
    memory_budget,
    model_sizes,
    plan_without_gpu,
)
from qlora.training.optimizer_check import check_optimizer
from qlora.training.run_lock import check_not_locked
from qlora.training.same_run import check_same_run, describe_run
from qlora.training.training_args import TrainingSetup, read_training_args, samples_per_step

logger = logging.getLogger(__name__)


@dataclass
class Preflight:
    """What is known of a run before its model is loaded; what could not be found out is None.

    Attributes:
        args: the flags, with files in place of data sets of the Hub.
        setup: TrainingArguments, compute dtype and the JSON's activation checkpointing.
        resume_from: the checkpoint to resume from; None for a new run.
        config: of the model, whose folder is complete.
        tokenizer: of the model.
        train_samples, eval_samples: tokenized; `eval_samples` is None for no evaluation, too.
        bitsandbytes_works: on the GPU.
        lora: settings of the adapter, by the flags or by `--init_adapter`.
        adapter: its tensors, without values.
        plan: the memory plan; None for the plain path, too.
        counts: numbers of steps, evaluations and checkpoints.
        disk: bytes needed and free.
        copy_source: what a 4-bit copy is to be made from, if `--save_4bit` asks for one that is not there.
        run: what defines the run, see `describe_run`.
        problems: everything that is wrong, a sentence each.
    """

    args: FinetuneArguments
    setup: TrainingSetup | None = None
    resume_from: str | None = None
    config: ModelDescription | None = None
    tokenizer: ChatTokenizer | None = None
    train_samples: Dataset | None = None
    eval_samples: Dataset | None = None
    bitsandbytes_works: bool = False
    lora: LoraSettings | None = None
    adapter: dict[str, torch.Tensor] | None = None
    plan: MemoryPlan | None = None
    counts: RunCounts | None = None
    disk: DiskSpace | None = None
    copy_source: dict | None = None
    run: dict | None = None
    problems: list[str] = field(default_factory=list)

    @property
    def trainable(self) -> int | None:
        """Parameters of the adapter; None if it is not known."""
        return sum(tensor.numel() for tensor in self.adapter.values()) if self.adapter else None

    @property
    def compute_dtype(self) -> torch.dtype:
        """The type of the arithmetic."""
        return self.setup.compute_dtype if self.setup else choose_compute_dtype(self.args.compute_dtype)

    def plan_table(self) -> str | None:
        """The memory plan as lines of text; None where memory is not planned."""
        if not (self.config and self.plan and self.plan.predicted_peak):
            return None
        return self.plan.table(self.config.num_hidden_layers)

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
            listed = [problem.replace("\n", "\n  ") for problem in self.problems]
            raise ValueError("\n- ".join([f"{len(self.problems)} things are wrong:", *listed]))


def run_preflight(args: FinetuneArguments) -> Preflight:
    """Makes every check, or with `--dry_run` those of tokenizer and data. Tokenized rows stay in the cache.

    Raises:
        ValueError: the model would have to be downloaded, and other things are wrong.
    """
    preflight = Preflight(args)
    with preflight.collect_problems():
        args = preflight.args = with_local_files(args)
    if args.dry_run is not None:
        find_model(preflight, check_weights=False)
        check_rows(preflight)
        return preflight
    with preflight.collect_problems():
        preflight.setup = read_training_args(
            args.train_args_json, args.training_args, args.compute_dtype, evaluate=args.eval_data_path is not None
        )
    if preflight.setup and is_main_process():  # of several processes the main one may hold the lock by now
        with preflight.collect_problems():
            check_not_locked(preflight.setup.training_args.output_dir)
    if hub_name(args.model_name_or_path):
        check_rows(preflight)  # before gigabytes are downloaded
        if args.download:
            preflight.raise_problems()
    find_model(preflight)
    if args.save_4bit and preflight.config:
        check_save_4bit(preflight, preflight.config)
    check_rows(preflight)  # before the GPU is used: its processes are forked from this one
    check_gpu(preflight)
    check_adapter(preflight)
    if preflight.config and preflight.lora:
        check_memory(preflight, preflight.config, preflight.lora)
    if preflight.setup:
        check_output(preflight, preflight.setup.training_args)
    return preflight


def find_model(preflight: Preflight, check_weights: bool = True):
    """Downloads the model if the user agrees; checks it, and loads its tokenizer, which needs no weights."""
    args = preflight.args
    may_ask = args.check is None and args.dry_run is None and not preflight.problems
    with preflight.collect_problems():
        fetch_model(args.model_name_or_path, args, may_ask)
        if check_weights:
            with preflight.collect_problems():
                preflight.config = check_checkpoint(args.model_name_or_path)
        check_tokenizer(args.model_name_or_path)
        preflight.tokenizer = load_tokenizer(args.model_name_or_path)


def check_save_4bit(preflight: Preflight, config: ModelDescription):
    """Checks that a 4-bit copy of the model can be written, unless it is there."""
    path, dtype = preflight.args.model_name_or_path, preflight.compute_dtype
    with preflight.collect_problems():
        target, source = copy_folder(path), copy_source(path, dtype)
        if is_quantized(config) or is_copy_of(target, source):
            return
        if target.exists() and not (target / COPY_SOURCE).is_file():
            advice = "move it, or name it with --model_name_or_path"
            raise ValueError(f"--save_4bit: {target} exists, and was not written by it: {advice}.")
        if not os.access(target.parent, os.W_OK):
            place = f"{target.parent}, beside the model's folder,"
            raise ValueError(f"--save_4bit: {place} cannot be written to: leave it out.")
        check_room("--save_4bit", target.parent, quantized_bytes(config, dtype), "leave it out")
        preflight.copy_source = source


def check_gpu(preflight: Preflight):
    """Checks that the GPU is there and large enough for the model, and that the libraries work on it."""
    if preflight.config:
        with preflight.collect_problems():
            check_device(preflight.config, preflight.compute_dtype)
        if preflight.args.compute_dtype == "fp8":
            with preflight.collect_problems():
                check_fp8(preflight.config)
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
    local = list(dict.fromkeys(path for path in paths if not is_hub_name(path)))
    if not all(map(os.path.isfile, local)):
        tokenizer = None  # the others are read, but not tokenized, which takes longer
    loaded: dict[str, Dataset] = {}
    limits = args.max_input_length, args.max_output_length
    encoder = tokenizer and SampleEncoder(tokenizer, args.prompt_text, *limits, args.train_on)
    with setup.training_args.main_process_first(desc="tokenizing") if setup else contextlib.nullcontext():
        for path in local:
            with preflight.collect_problems():
                if encoder:
                    loaded[path] = load_samples(path, encoder)
                else:
                    load_rows(path)
    if all(path in loaded for path, _ in files):
        with preflight.collect_problems():
            seed = setup.training_args.seed if setup else 0
            preflight.train_samples = mix_samples([(path, loaded[path], weight) for path, weight in files], seed)
    if args.eval_data_path:
        preflight.eval_samples = loaded.get(args.eval_data_path)


def check_adapter(preflight: Preflight):
    """Finds the settings of the adapter; logs a warning if that of `--init_adapter` was trained on another model."""
    args = preflight.args
    with preflight.collect_problems():
        preflight.lora = args.lora_settings(adapter_settings(args.init_adapter) if args.init_adapter else None)
    if args.init_adapter and preflight.lora:
        with contextlib.suppress(OSError, ValueError):  # a base model that is gone is another one
            if Path(base_model_path(args.init_adapter)).samefile(args.model_name_or_path):
                return
        logger.warning("The adapter in %s was not trained on %s.", args.init_adapter, args.model_name_or_path)


def check_memory(preflight: Preflight, config: ModelDescription, lora: LoraSettings):
    """Finds the adapter's size and the memory plan, from a model without weights."""
    args, setup = preflight.args, preflight.setup
    with preflight.collect_problems():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=preflight.compute_dtype)
            model.name_or_path = args.model_name_or_path
            model = add_adapter(model, lora, args.init_adapter)
        preflight.adapter = get_peft_model_state_dict(model, save_embedding_layers=False)
        fixed = args.fixed_plan(setup.recompute if setup else None, config.num_hidden_layers)
        if args.plain:
            return
        if not torch.cuda.is_available() and not args.memory_budget:
            preflight.plan = plan_without_gpu(fixed)
            return
        budget = memory_budget(args.memory_budget)
        if setup and preflight.train_samples:
            lengths = numpy_column(preflight.train_samples, "length").tolist()
            sizes = model_sizes(model, lora, setup.training_args.world_size, setup.fp8)
            step_tokens = longest_step(lengths, samples_per_step(setup.training_args))
            plan = choose_plan(sizes, step_tokens, max(lengths), budget, fixed)
            preflight.plan = dataclasses.replace(plan, budget=budget if args.memory_budget else None)


def check_output(preflight: Preflight, training_args: TrainingArguments):
    """Checks the checkpoint to resume from and the output_dir: it is free, it is writable, it has room."""
    args = preflight.args
    with preflight.collect_problems():
        if preflight.train_samples:
            preflight.counts = count_steps(training_args, len(preflight.train_samples))
    with preflight.collect_problems():
        preflight.resume_from = find_checkpoint(args.resume_from_checkpoint, training_args.output_dir)
        if preflight.resume_from and preflight.lora:
            check_same_adapter(preflight.resume_from, preflight.lora)
        check_output_dir(training_args.output_dir, preflight.resume_from)
    with preflight.collect_problems():
        check_run(preflight, training_args)
    with preflight.collect_problems():
        source = f"{args.train_args_json} and the command line" if args.training_args else args.train_args_json
        check_optimizer(source, training_args, preflight.counts.steps if preflight.counts else 1)
    with preflight.collect_problems():
        check_disk(preflight, training_args)


def check_run(preflight: Preflight, training_args: TrainingArguments):
    """Describes the run, and checks that a resumed one is that of its checkpoint, and has something to do."""
    args, setup, samples, checkpoint = preflight.args, preflight.setup, preflight.train_samples, preflight.resume_from
    if not (setup and samples and preflight.adapter and preflight.counts):
        return
    preflight.run = describe_run(args, setup, len(samples), preflight.adapter)
    if checkpoint:
        check_same_run(checkpoint, preflight.run)
        check_steps_left(checkpoint, training_args.output_dir, preflight.counts.steps)
        if training_args.load_best_model_at_end:
            check_best_checkpoint(checkpoint)


def check_disk(preflight: Preflight, training_args: TrainingArguments):
    """ValueError or OSError unless output_dir can be written to and has room for everything that the run writes."""
    output_dir = training_args.output_dir
    folder = existing_parent(Path(output_dir))
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"output_dir {output_dir}: {folder} cannot be written to ({error.strerror}).") from error
    if preflight.counts and preflight.trainable:
        model_folder = Path(preflight.args.model_name_or_path)
        tokenizer = sum((model_folder / name).stat().st_size for name in tokenizer_files(model_folder))
        needed = disk_needed(training_args, preflight.counts, preflight.trainable, tokenizer)
        preflight.disk = DiskSpace(needed, shutil.disk_usage(folder).free)
        check_room(f"output_dir {output_dir}", folder, needed, "set save_total_limit in the JSON")
