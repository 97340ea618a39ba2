"""The adapter's README.md as the Hugging Face Hub shows it: how the adapter was trained, its losses, its scores."""

import dataclasses
import hashlib
import re
import shlex
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import TrainingArguments
from transformers.utils import CHAT_TEMPLATE_FILE

from qlora.arguments import REPOSITORY, FinetuneArguments, LoraSettings
from qlora.checkpoint import all_tokenizer_files
from qlora.data.hub_rows import data_set_of, folder_of_files
from qlora.data.row_files import update_hash
from qlora.hub import fetch
from qlora.hub.repository import model_source
from qlora.training.same_run import MAY_CHANGE
from qlora.training.training_args import TrainingSetup

if TYPE_CHECKING:
    from datasets import Dataset

CARD, PICTURE = "README.md", "loss.png"
UPLOADED = (
    "adapter_config.json",
    "adapter_model.safetensors",
    *all_tokenizer_files(),
    CHAT_TEMPLATE_FILE,
    CARD,
    PICTURE,
)
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "datasets", "accelerate")
ALWAYS_SHOWN = (
    "learning_rate",
    "lr_scheduler_type",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "seed",
)
NOT_SHOWN = (  # names that begin so: paths, and what has no effect on the result or is shown otherwise
    *MAY_CHANGE,
    "bf16",
    "check",
    "compute_dtype",  # shown as what it came to
    "download",
    "dry_run",
    "eval_data_path",
    "fp16",
    "hub",
    "init_adapter",
    "lora_",
    "model_name_or_path",
    "resume_from_checkpoint",
    "revision",
    "train_args_json",
    "train_data_path",
    "training_args",
)
TEMPLATE = """---
{{ card_data }}
---

# {{ name }}

A LoRA adapter for {{ base }}, trained with QLoRA (4-bit NF4) by chatglm-6b-qlora.

这是 {{ base }} 的 LoRA 适配器，由 chatglm-6b-qlora 以 QLoRA（4bit NF4）训练。

## Use / 使用

In the repository of chatglm-6b-qlora, with this folder as `saved_files/{{ name }}`:

```bash
python inference_qlora.py --adapter_path saved_files/{{ name }}{{ prompt_flag }}            # answers before and after
python inference_qlora.py --adapter_path saved_files/{{ name }}{{ prompt_flag }} --serve    # OpenAI's API
```

Or from Python with peft:

```python
import glm_models  # makes the models known to the Auto classes

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{{ base }}")
model = AutoModelForCausalLM.from_pretrained("{{ base }}", dtype=torch.bfloat16, device_map="cuda")
model = PeftModel.from_pretrained(model, "saved_files/{{ name }}").eval()
reply, history = model.chat(tokenizer, "你好")
```

## Training data / 训练数据

| File | Samples | SHA-256 |
| --- | ---: | --- |
{% for file in files -%}
| {{ file.name }}{{ " (evaluation)" if file.evaluation }} | {{ "{:,}".format(file.samples) }} | `{{ file.sha256 }}` |
{% endfor %}
## Training / 训练

{% for line in losses -%}
- {{ line }}
{% endfor %}
{% if picture -%}
![Training and evaluation loss]({{ picture }})

{% endif -%}
| Setting | Value |
| --- | --- |
{% for name, value in settings.items() -%}
| {{ name }} | {{ value }} |
{% endfor %}
Software: {{ software }}.
"""


@dataclasses.dataclass
class DataFile:
    """A file of data rows; `samples` are those of an epoch, as often as the file's weight repeats them."""

    name: str
    samples: int
    sha256: str
    evaluation: bool = False


def write_model_card(
    folder: Path,
    args: FinetuneArguments,
    setup: TrainingSetup,
    lora: LoraSettings,
    files: list[DataFile],
    log_history: list[dict],
):
    """Writes the card of a run that has ended.

    Args:
        folder: to write into; the picture of the losses is shown if it is there.
        args: the flags of the run.
        setup: its settings from the JSON.
        lora: those of its adapter.
        files: its data, see `data_files`.
        log_history: of the Trainer.
    """
    base, prompt_text = shown_path(args.model_name_or_path), args.prompt_text
    is_hub_name = fetch.NAME.fullmatch(base)
    paths = [*(path for path, _ in args.train_files()), *([args.eval_data_path] if args.eval_data_path else [])]
    data = ModelCardData(
        base_model=base if is_hub_name else None,  # the Hub refuses a card with another text
        datasets=sorted({name for name in map(data_set_of, paths) if name}) or None,
        library_name="peft",
        language=["zh", "en"],
        pipeline_tag="text-generation",
        tags=["chatglm", "lora", "qlora", *([f"base_model:adapter:{base}"] if is_hub_name else [])],
    )
    ModelCard.from_template(
        data,
        template_str=TEMPLATE,
        name=Path(setup.training_args.output_dir).resolve().name,
        base=base,
        prompt_flag=f" --prompt_text {shlex.quote(prompt_text)}" if prompt_text else "",
        files=files,
        losses=describe_losses(log_history),
        picture=PICTURE if (folder / PICTURE).is_file() else None,
        settings=describe_settings(args, setup, lora),
        software=library_versions(),
    ).save(folder / CARD)


def library_versions() -> str:
    """The libraries that a run depends on, with their versions."""
    return ", ".join(f"{name} {version(name)}" for name in LIBRARIES)


def shown_path(path: str) -> str:
    """A path for everyone to read: from the working folder or the repository; elsewhere without its parents' names.

    The file of a data set of the Hub begins with the name of the data set.
    """
    for parent in (folder_of_files(), Path.cwd(), REPOSITORY):
        if Path(path).resolve().is_relative_to(parent):
            return Path(path).resolve().relative_to(parent).as_posix()
    return Path(path).name


def data_files(args: FinetuneArguments, train: "Dataset", evaluation: "Dataset | None") -> list[DataFile]:
    """The files of a run, to be called before it: they may change while it trains."""
    paths = [path for path, _ in args.train_files()]
    samples = Counter(train["file"]) if "file" in train.column_names else {paths[0]: len(train)}
    files = [DataFile(shown_path(path), samples[path], sha256(path)) for path in dict.fromkeys(paths)]
    if args.eval_data_path and evaluation is not None:
        path = args.eval_data_path
        files.append(DataFile(shown_path(path), len(evaluation), sha256(path), evaluation=True))
    return files


def sha256(path: str) -> str:
    """The hash of a file, as `sha256sum` prints it."""
    digest = hashlib.sha256()
    update_hash(digest, path)
    return digest.hexdigest()


def describe_losses(log_history: list[dict]) -> list[str]:
    """The first and the last training loss, and the last and the lowest evaluation loss, a sentence each."""
    training = [entry for entry in log_history if "loss" in entry]
    evaluation = [entry for entry in log_history if "eval_loss" in entry]
    lines = []
    if training:
        first, last = training[0], training[-1]
        lines.append(
            f"training loss: {first['loss']:.3f} (step {first['step']}) → {last['loss']:.3f} (step {last['step']})"
        )
    if evaluation:
        last, lowest = evaluation[-1], min(evaluation, key=lambda entry: entry["eval_loss"])
        lines.append(
            f"evaluation loss: {last['eval_loss']:.3f} (step {last['step']}), "
            f"at its lowest {lowest['eval_loss']:.3f} (step {lowest['step']})"
        )
    return lines


def describe_settings(flags: FinetuneArguments, setup: TrainingSetup, lora: LoraSettings) -> dict[str, object]:
    """The adapter's settings, flags and TrainingArguments not at their defaults, and those that everyone asks for."""
    training_args = setup.training_args
    usual = TrainingArguments(output_dir=training_args.output_dir)
    shown: dict[str, object] = {"compute_dtype": setup.arithmetic}
    shown |= {f"lora_{name}": readable(value) for name, value in lora._asdict().items()}
    if source := model_source(flags.model_name_or_path):
        shown["base_model"] = "{repository}, revision {revision} ({hub})".format(**source)
    if flags.init_adapter:
        shown["init_adapter"] = shown_path(flags.init_adapter)
    for values, defaults in (
        (vars(flags), vars(type(flags)())),
        (training_args.to_dict(), usual.to_dict()),
    ):
        shown |= {
            name: readable(value)
            for name, value in values.items()
            if name in ALWAYS_SHOWN or (not name.startswith(NOT_SHOWN) and value != defaults.get(name))
        }
    if training_args.max_steps > 0:  # which is stronger
        del shown["num_train_epochs"]
    return shown


def readable(value: object) -> object:
    """A list as its elements with commas; anything else as it is."""
    return ", ".join(map(str, value)) if isinstance(value, list) else value


def add_section(folder: Path, name: str, text: str, scores: dict[str, float] | None = None):
    """Adds a section to an adapter's card, or replaces the one of this name; without a card it does nothing.

    Args:
        folder: of the adapter.
        name: of the section: what was evaluated, and how.
        text: in Markdown.
        scores: metric -> value, for the head of the card.
    """
    if not (folder / CARD).is_file():
        return
    card = ModelCard.load(folder / CARD)
    start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    section = f"{start}\n## {name}\n\n{text}\n{end}"
    earlier = re.compile(f"{re.escape(start)}.*?{re.escape(end)}", re.S)
    if earlier.search(card.text):
        card.text = earlier.sub(lambda _: section, card.text)
    else:
        card.text = f"{card.text.rstrip()}\n\n{section}\n"
    if scores:
        others = [result for result in card.data.eval_results or [] if result.dataset_name != name]
        card.data.model_name = card.data.model_name or folder.resolve().name
        card.data.eval_results = others + [
            EvalResult("text-generation", "json", name, metric_type, round(value, 2), metric_name=metric.upper())
            for metric, value in scores.items()
            for metric_type in [metric.partition("-")[0]]  # the Hub's name: bleu, rouge
        ]
    card.save(folder / CARD)
