"""The flags of training and inference, and which fields of transformers' TrainingArguments are flags besides.

Imports nothing that takes time, so that `--help` and a misspelt flag are answered at once.
"""

import ast
import dataclasses
import importlib.util
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from qlora.units import parse_size

REPOSITORY = Path(__file__).resolve().parents[1]
COMPUTE_DTYPES = ("fp32", "fp16", "bf16")
COMPUTE_DTYPE_FLAG = {
    "help": "Type of the arithmetic; by default bf16 where the GPU has it, else fp16, and fp32 on a CPU.",
    "choices": COMPUTE_DTYPES,
}
TRAINING_DTYPE_FLAG = {
    "help": "Type of the arithmetic; by default bf16 where the GPU has it, else fp16, and fp32 on a CPU; fp8 is bf16 "
    "with 8-bit matrix products, on Ada, Hopper and newer GPUs.",
    "choices": (*COMPUTE_DTYPES, "fp8"),
    "expert": True,
}
DEFAULT_MODEL, DEFAULT_ADAPTER = "THUDM/chatglm-6b", "saved_files/chatGLM_6B_QLoRA_t32"
DEFAULT_PROMPT = "类型#裙*版型#显瘦*风格#文艺*风格#简约*图案#印花*图案#撞色*裙下摆#压褶*裙长#连衣裙*裙领型#圆领"

LAYER_COUNTS = ("recompute_mlp", "recompute_attention", "dequantized_layers")
PLAN_FLAGS = ("max_tokens", *LAYER_COUNTS, "offload")
LOWEST_TEMPERATURE = 0.01  # at lower ones sampling is greedy but for overflows
# Keys of older transformers and their present names.
RENAMED_KEYS = {
    "evaluation_strategy": "eval_strategy",
    "warmup_ratio": "warmup_steps",  # a value below 1 is a fraction of all steps
    "no_cuda": "use_cpu",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "push_to_hub_model_id": "hub_model_id",
    "push_to_hub_token": "hub_token",
}
OLD_LAYER_COUNTS = {"kept_mlp": "recompute_mlp", "kept_attention": "recompute_attention"}  # they count the others


class LoraSettings(NamedTuple):
    """The settings of an adapter, in the order in which `add_lora` takes them."""

    rank: int = 4
    alpha: float = 32
    dropout: float = 0.05
    target_modules: list[str] = ["query_key_value"]


def in_repository(path: str) -> str:
    """A path that counts from the repository; relative if it is below the current folder, absolute elsewhere."""
    full, here = REPOSITORY / path, Path.cwd()
    return str(full.relative_to(here)) if full.is_relative_to(here) else str(full)


def copy_folder(path: str) -> Path:
    """Where the 4-bit copy of a model belongs: beside its folder."""
    folder = Path(os.path.abspath(path))
    return folder.with_name(f"{folder.name}-nf4")


def training_argument_names() -> list[str]:
    """The fields of TrainingArguments in the installed transformers, from its source: its import takes seconds."""
    transformers = importlib.util.find_spec("transformers")
    if transformers is None or transformers.origin is None:
        return []
    source = Path(transformers.origin).with_name("training_args.py").read_text(encoding="utf-8")
    classes = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
    fields = [node.target for node in classes["TrainingArguments"].body if isinstance(node, ast.AnnAssign)]
    return [*(target.id for target in fields if isinstance(target, ast.Name)), *RENAMED_KEYS, "group_by_length"]


@dataclass(kw_only=True)
class DownloadArguments:
    """Whether a model whose folder is missing is downloaded, and from where."""

    download: bool = field(
        default=False,
        metadata={"help": "Download the model if there is no folder of its name, without asking.", "expert": True},
    )
    hub: str = field(
        default="huggingface",
        metadata={
            "help": "Where the model is downloaded from.",
            "choices": ["huggingface", "modelscope"],
            "expert": True,
        },
    )
    revision: str | None = field(
        default=None,
        metadata={"help": "Commit, branch or tag to download; by default the newest commit.", "expert": True},
    )


@dataclass
class FinetuneArguments(DownloadArguments):
    """What to fine-tune, on what, and the size of the adapter."""

    train_args_json: str = field(
        default_factory=lambda: in_repository("chatGLM_6B_QLoRA.json"),
        metadata={"help": "JSON file with transformers' TrainingArguments."},
    )
    model_name_or_path: str = field(
        default_factory=lambda: in_repository(DEFAULT_MODEL),
        metadata={"help": "Folder with THUDM/chatglm-6b, chatglm2-6b or chatglm3-6b, or the model's name on a hub."},
    )
    save_4bit: bool = field(
        default=False,
        metadata={
            "help": "Write a 4-bit copy beside the model's folder, if it has none, which every program then loads "
            "instead: faster, with the same values.",
            "expert": True,
        },
    )
    train_data_path: list[str] = field(
        default_factory=lambda: [in_repository("data/train.jsonl")],
        metadata={
            "help": "Training rows, one JSON a line, or names of data sets on the Hugging Face Hub; several, with "
            "weights, as a.jsonl b.jsonl:0.5."
        },
    )
    eval_data_path: str | None = field(
        default_factory=lambda: in_repository("data/dev.jsonl"),
        metadata={"help": "Evaluation rows, as one file or data set; 'none' for no evaluation."},
    )
    train_split: str | None = field(
        default=None,
        metadata={
            "help": "Split of a data set of the Hub to train on, such as train[:1000]; by default train.",
            "expert": True,
        },
    )
    eval_split: str | None = field(
        default=None,
        metadata={"help": "Split of a data set of the Hub to evaluate on; by default test.", "expert": True},
    )
    column_map: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Columns of a data set of the Hub that have other names than the fields, as instruction=question "
            "output=answer.",
            "expert": True,
        },
    )
    max_input_length: int = field(
        default=512, metadata={"help": "Longest prompt in tokens, control tokens included; the rest is cut."}
    )
    max_output_length: int = field(
        default=1536, metadata={"help": "Longest answer in tokens, the one that ends it included; the rest is cut."}
    )
    train_on: str = field(
        default="all",
        metadata={
            "help": "Answers of a conversation to train on: all, or the last.",
            "choices": ["all", "last"],
            "expert": True,
        },
    )
    lora_rank: int | None = field(
        default=None, metadata={"help": "Rank r of the adapter's matrices; by default 4, or that of --init_adapter."}
    )
    lora_alpha: float | None = field(
        default=None,
        metadata={"help": "The output is scaled by lora_alpha / r; by default 32, or that of --init_adapter."},
    )
    lora_dropout: float = field(
        default=0.05, metadata={"help": "Dropout before the adapter's matrices, 0 to 1.", "expert": True}
    )
    lora_target_modules: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Layers with an adapter, of query_key_value dense dense_h_to_4h dense_4h_to_h; by default the "
            "first, or those of --init_adapter."
        },
    )
    init_adapter: str | None = field(
        default=None,
        metadata={"help": "Adapter folder to start from its values, with a new optimizer: to train on with new data."},
    )
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "A checkpoint folder to continue from, or 'last' for the newest one."}
    )
    prompt_text: str = field(default="", metadata={"help": "Text put before every instruction.", "expert": True})
    memory_budget: str | None = field(
        default=None, metadata={"help": "GPU memory to use at most, such as 8GiB; by default all that is free."}
    )
    max_tokens: int | None = field(
        default=None, metadata={"help": "Most tokens of a micro-batch; by default planned.", "expert": True}
    )
    recompute_mlp: int | None = field(
        default=None,
        metadata={
            "help": "Layers whose MLP activations are recomputed in the backward pass; by default planned.",
            "expert": True,
        },
    )
    recompute_attention: int | None = field(
        default=None,
        metadata={
            "help": "Layers whose attention activations are recomputed in the backward pass; by default planned.",
            "expert": True,
        },
    )
    dequantized_layers: int | None = field(
        default=None,
        metadata={
            "help": "Layers whose dequantized weights are cached; by default planned.",
            "expert": True,
            "old_names": ["dense_layers"],
        },
    )
    offload: bool | None = field(
        default=None,
        metadata={
            "help": "Offload the inputs of recomputed layers to host memory; by default planned.",
            "expert": True,
        },
    )
    compute_dtype: str | None = field(default=None, metadata=TRAINING_DTYPE_FLAG)
    plain: bool = field(
        default=False,
        metadata={
            "help": "Train with peft's and bitsandbytes' layers on padded rows: slow, to compare with.",
            "expert": True,
        },
    )
    check: int | None = field(
        default=None,
        metadata={
            "help": "Check everything a run needs, show a sample, or as many as given, and stop.",
            "nargs": "?",
            "const": 1,
        },
    )
    dry_run: int | None = field(
        default=None,
        metadata={
            "help": "Read the data, show a sample, or as many as given, and stop; needs a tokenizer, but no weights.",
            "nargs": "?",
            "const": 1,
        },
    )
    demo: str | None = field(
        default=None,
        metadata={
            "help": "Make, train and ask a tiny model, chatglm if none is named, to see the whole way, without a GPU.",
            "nargs": "?",
            "const": "chatglm",
            "choices": ["chatglm", "chatglm2", "chatglm3"],
        },
    )
    kept_mlp: int | None = field(
        default=None, metadata={"help": "Use --recompute_mlp, which counts the other layers.", "hidden": True}
    )
    kept_attention: int | None = field(
        default=None, metadata={"help": "Use --recompute_attention, which counts the other layers.", "hidden": True}
    )
    training_args: dict[str, list[str]] = field(
        default_factory=dict,
        metadata={
            "help": "Any field of TrainingArguments is a flag, too, and takes the place of the JSON's: "
            "--learning_rate 1e-4 --num_train_epochs 2 --output_dir my_adapter.",
            "others": training_argument_names,
        },
    )

    def lora_settings(self, of_adapter: LoraSettings | None = None) -> LoraSettings:
        """The settings of the adapter to train: of the flags and, where they are not given, the defaults.

        Args:
            of_adapter: those of `--init_adapter`, which take the place of the defaults, except for the dropout.
        Raises:
            ValueError: a flag contradicts `--init_adapter`.
        """
        modules = sorted(set(self.lora_target_modules))
        base = of_adapter or LoraSettings()
        if of_adapter:
            flags = {"rank": self.lora_rank, "alpha": self.lora_alpha, "target_modules": modules}
            given = {name: value for name, value in flags.items() if value}
            has = of_adapter._asdict()
            different = [f"--lora_{name} is {v}, not {has[name]}" for name, v in given.items() if v != has[name]]
            if different:
                raise ValueError(
                    f"{'; '.join(different)} as in --init_adapter {self.init_adapter}, which keeps its shape: leave "
                    "these flags out."
                )
        return LoraSettings(
            self.lora_rank or base.rank,
            self.lora_alpha or base.alpha,
            self.lora_dropout,
            modules or base.target_modules,
        )

    def fixed_plan(self, recompute: bool | None, num_layers: int) -> dict[str, int]:
        """The fields of the memory plan that were given, by flags or by the JSON's gradient checkpointing.

        Args:
            recompute: the JSON's setting: True for all activations, False for none; None where it has none.
            num_layers: of the model.
        Raises:
            ValueError: more layers than the model has.
        """
        fixed: dict[str, int] = {}
        if recompute is not None:
            fixed |= dict.fromkeys(OLD_LAYER_COUNTS.values(), num_layers if recompute else 0)
        for name in (*LAYER_COUNTS, *OLD_LAYER_COUNTS):
            if (getattr(self, name) or 0) > num_layers:
                raise ValueError(f"--{name} is {getattr(self, name)}; the model has {num_layers} layers.")
        for name in PLAN_FLAGS:
            if getattr(self, name) is not None:
                fixed[name] = getattr(self, name)
        for old, new in OLD_LAYER_COUNTS.items():
            if getattr(self, old) is not None:
                fixed[new] = num_layers - getattr(self, old)
        return fixed

    def train_files(self) -> list[tuple[str, float]]:
        """The files of `--train_data_path` with their weights."""
        return list(map(split_weight, self.train_data_path))

    def __post_init__(self) -> None:
        problems = [*self.data_problems(), *self.adapter_problems(), *self.plan_problems()]
        for name in ("check", "dry_run"):
            if (getattr(self, name) or 0) < 0:
                problems.append(f"--{name} is {getattr(self, name)}; it must not be negative")
        if self.check is not None and self.dry_run is not None:
            problems.append("--check shows what --dry_run shows, and more; give one of them")
        if problems:
            raise ValueError("; ".join(problems) + ".")
        if self.eval_data_path in ("none", ""):
            self.eval_data_path = None

    def data_problems(self) -> list[str]:
        """What is wrong with the flags of the data."""
        problems = [
            f"--train_data_path {text}: the weight must be a positive number"
            for text, (_, weight) in zip(self.train_data_path, self.train_files(), strict=True)
            if not 0 < weight < math.inf
        ]
        if self.max_input_length < 3:
            problems.append(f"--max_input_length is {self.max_input_length}; a prompt needs at least 3 tokens")
        if self.max_output_length < 2:
            problems.append(f"--max_output_length is {self.max_output_length}; an answer needs at least 2 tokens")
        return problems

    def adapter_problems(self) -> list[str]:
        """What is wrong with the flags of the adapter."""
        problems = not_positive(self, "lora_rank")
        if self.lora_alpha is not None and not 0 < self.lora_alpha < math.inf:
            problems.append(f"--lora_alpha is {self.lora_alpha}; it must be a positive number")
        if not 0 <= self.lora_dropout < 1:
            problems.append(f"--lora_dropout is {self.lora_dropout}; it must be at least 0 and below 1")
        if self.init_adapter and self.resume_from_checkpoint:
            problems.append(
                "--init_adapter starts a new run from an adapter, --resume_from_checkpoint goes on with an earlier "
                "run: give one of them"
            )
        return problems

    def plan_problems(self) -> list[str]:
        """What is wrong with the flags of the memory plan."""
        problems = not_positive(self, "max_tokens")
        values = {name: getattr(self, name) for name in (*LAYER_COUNTS, *OLD_LAYER_COUNTS)}
        problems += [f"--{name} is {v}; it must not be negative" for name, v in values.items() if v and v < 0]
        problems += [
            f"--{old} is of an earlier release and fixes what --{new} does: give one of them"
            for old, new in OLD_LAYER_COUNTS.items()
            if values[old] is not None and values[new] is not None
        ]
        if self.memory_budget is not None:
            try:
                parse_size(self.memory_budget)
            except ValueError as error:
                problems.append(f"--memory_budget {error}")
        planned = ("memory_budget", *PLAN_FLAGS, *OLD_LAYER_COUNTS)
        ignored = [f"--{name}" for name in planned if getattr(self, name) is not None]
        if self.plain and ignored:
            problems.append(f"--plain plans nothing, and does not heed {', '.join(ignored)}")
        if self.plain and self.compute_dtype == "fp8":
            problems.append("--plain has no --compute_dtype fp8; choose fp32, fp16 or bf16")
        return problems


@dataclass
class InferenceArguments(DownloadArguments):
    """What to answer, with which adapter, and how."""

    adapter_path: list[str] = field(
        default_factory=lambda: [in_repository(DEFAULT_ADAPTER)],
        metadata={
            "help": "Folder of the trained adapter, or with --serve of several; 'none' to ask a base or merged model "
            "alone."
        },
    )
    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": f"Model folder or name on a hub; by default that of the adapter's config, or {DEFAULT_MODEL}."
        },
    )
    prompt: list[str] = field(
        default_factory=list, metadata={"help": "A prompt; may be given many times.", "action": "extend"}
    )
    prompt_file: str | None = field(
        default=None,
        metadata={
            "help": "Prompts from a file: .jsonl, rows with instruction or strings; .json, an array of these; else "
            "one text a line."
        },
    )
    max_prompts: int | None = field(default=None, metadata={"help": "Answer only the first so many prompts."})
    output: str | None = field(
        default=None,
        metadata={"help": "New file that keeps the answers too, as they are finished, one JSON a line."},
    )
    prompt_text: str = field(default="", metadata={"help": "Text put before every prompt, as in training."})
    do_sample: bool = field(
        default=False,
        metadata={"help": "Sample with temperature, top_k and top_p instead of taking the likeliest token."},
    )
    top_k: int = field(
        default=50, metadata={"help": "Sampling: this many most likely tokens at most; 0 for any number."}
    )
    top_p: float | None = field(
        default=None,
        metadata={"help": "Sampling: smallest set of tokens with this probability; by default as the official chat."},
    )
    temperature: float | None = field(
        default=None,
        metadata={
            "help": f"Sampling: above 1 flatter, below 1 sharper, {LOWEST_TEMPERATURE} or more; by default as the "
            "official chat."
        },
    )
    seed: int = field(default=42, metadata={"help": "Random seed of the sampling."})
    max_new_tokens: int = field(default=512, metadata={"help": "Longest answer in tokens."})
    batch_size: int = field(
        default=8, metadata={"help": "Prompts answered at once; with --serve at most, as memory allows."}
    )
    chat: bool = field(default=False, metadata={"help": "Hold a conversation with the model instead."})
    web: bool = field(default=False, metadata={"help": "Show a page in the browser instead; needs gradio."})
    serve: bool = field(
        default=False, metadata={"help": "Serve OpenAI's API instead; needs fastapi, uvicorn and prometheus_client."}
    )
    host: str = field(
        default="127.0.0.1",
        metadata={
            "help": "Address that --web or --serve listens on; the environment variable QLORA_PASSWORD protects the "
            "page, QLORA_API_KEY the API."
        },
    )
    port: int = field(default=7860, metadata={"help": "Port that --web or --serve listens on."})
    compute_dtype: str | None = field(default=None, metadata=COMPUTE_DTYPE_FLAG)

    def __post_init__(self) -> None:
        problems = not_positive(self, "max_new_tokens", "batch_size", "max_prompts")
        if self.temperature is not None and not LOWEST_TEMPERATURE <= self.temperature < math.inf:
            problems.append(
                f"--temperature is {self.temperature}; it must be a finite number from {LOWEST_TEMPERATURE} up"
            )
        if self.top_k < 0:
            problems.append(f"--top_k is {self.top_k}; it must not be negative")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            problems.append(f"--top_p is {self.top_p}; it must be above 0 and at most 1")
        if not -(2**63) <= self.seed < 2**64:
            problems.append(f"--seed is {self.seed}; it must fit in 64 bits")
        if not 0 < self.port < 65536:
            problems.append(f"--port is {self.port}; it must be between 1 and 65535")
        if self.chat + self.web + self.serve > 1:
            problems.append(
                "--chat is the conversation on the terminal, --web the page and --serve the API; give one of them"
            )
        prompts = [f"--{name}" for name in ("prompt", "prompt_file", "max_prompts") if getattr(self, name)]
        if prompts and (self.chat or self.serve):
            problems.append(f"--chat and --serve ask for prompts themselves: leave out {', '.join(prompts)}")
        if self.output and (self.chat or self.web or self.serve):
            problems.append("--output keeps the answers to prompts, not those of --chat, --web and --serve")
        if self.adapter_path in (["none"], [""]):
            self.adapter_path = []
            if self.web:
                problems.append("--web compares a model with and without an adapter; without one, use --chat")
        if len(self.adapter_path) > 1 and not self.serve:
            problems.append(f"--adapter_path has {len(self.adapter_path)} folders; only --serve takes several")
        if problems:
            raise ValueError("; ".join(problems) + ".")

    def with_sampling(self, official: dict) -> "InferenceArguments":
        """The arguments with the official settings of a model where the user gave none."""
        missing = {name for name in ("temperature", "top_p") if getattr(self, name) is None}
        return dataclasses.replace(self, **{name: official[name] for name in missing})

    def sampling(self) -> dict[str, Any]:
        """Arguments of `make_sampler`."""
        return {name: getattr(self, name) for name in ("do_sample", "temperature", "top_k", "top_p")}


def split_weight(text: str) -> tuple[str, float]:
    """`path` or `path:weight` -> path, weight."""
    path, _, weight = text.rpartition(":")
    try:
        return (path, float(weight)) if path else (text, 1.0)
    except ValueError:
        return text, 1.0


def not_positive(arguments: object, *names: str) -> list[str]:
    """A problem for every named field that is given and below 1."""
    values = {name: getattr(arguments, name) for name in names}
    return [f"--{name} is {v}; it must be at least 1" for name, v in values.items() if v is not None and v < 1]
