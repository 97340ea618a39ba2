"""Merge an adapter into the base model's weights and write a folder in the official format. No GPU needed.

    python scripts/merge_lora.py --output_dir THUDM/chatglm-6b-merged
    python scripts/merge_lora.py --output_dir THUDM/chatglm-6b-merged --onto original --dtype bf16

The merged model needs no adapter: this project and the official code load it like the original. The official code is
copied if its *.py files are in the base model's folder.
"""

import shutil
from dataclasses import dataclass, field
from pathlib import Path

from qlora.arguments import COMPUTE_DTYPES, in_repository
from qlora.command_line import parse_command_line
from qlora.errors import message_instead_of_traceback, one_line_on_interrupt, set_up_logging

# Beside the tokenizer's files; to the official code config.json refers if it is copied.
COPIED = ("generation_config.json", "*.py", "*LICENSE*")
WEIGHTS = {
    "nf4": "the 4-bit weights that the adapter was trained against, dequantised",
    "original": "the original 16-bit weights",
}


@dataclass
class MergeArguments:
    """What to merge, into which weights, and where to."""

    output_dir: str = field(metadata={"help": "Folder to write; it must not exist."})
    adapter_path: str = field(
        default_factory=lambda: in_repository("saved_files/chatGLM_6B_QLoRA_t32"),
        metadata={"help": "Folder of the trained adapter."},
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Base model folder; by default the one written in the adapter's config."}
    )
    onto: str = field(
        default="nf4",
        metadata={
            "help": "nf4: the weights as training saw them, in 4 bits, dequantised; original: the 16-bit weights.",
            "choices": list(WEIGHTS),
        },
    )
    compute_dtype: str = field(
        default="bf16",
        metadata={
            "help": "Type of the arithmetic in training, on which its 4-bit weights depend a little.",
            "choices": list(COMPUTE_DTYPES),
        },
    )
    dtype: str = field(default="fp16", metadata={"help": "Type of the merged weights.", "choices": ["fp16", "bf16"]})


@one_line_on_interrupt()
def main():
    set_up_logging()
    with message_instead_of_traceback():
        args = parse_command_line(MergeArguments)
        merge(args)


def merge(args: MergeArguments):
    """Writes the merged model, one tensor at a time."""
    # Imported here, since these imports take seconds: a misspelt flag is reported before.
    from qlora.adapter import base_model_path
    from qlora.atomic import atomic_folder
    from qlora.checkpoint import tokenizer_files
    from qlora.export.merging import merged_tensors
    from qlora.export.official_folder import write_checkpoint
    from qlora.loading import DTYPES, load_tokenizer

    base_path = args.model_name_or_path or base_model_path(args.adapter_path)
    config, tensor = merged_tensors(base_path, args.adapter_path, args.onto, DTYPES[args.compute_dtype])
    with atomic_folder(args.output_dir) as folder:
        folder.mkdir(parents=True)
        patterns = (*tokenizer_files(Path(base_path)), *COPIED)
        for file in [file for pattern in patterns for file in Path(base_path).glob(pattern)]:
            shutil.copyfile(file, folder / file.name)
        load_tokenizer(base_path).save_chat_templates(folder, {}, None, save_jinja_files=True)
        write_checkpoint(folder, config, tensor, dtype=DTYPES[args.dtype])
    weights = WEIGHTS[args.onto]
    print(f"Merged {args.adapter_path} into {weights} ({base_path}); wrote {args.output_dir} in {args.dtype}")


if __name__ == "__main__":
    main()
