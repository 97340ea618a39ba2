"""Merge an adapter into the base model's weights; write them for this project or for others. No GPU needed.

    python scripts/merge_lora.py --output_dir THUDM/chatglm-6b-merged
    python scripts/merge_lora.py --output_dir THUDM/chatglm-6b-merged --onto original --dtype bf16
    python scripts/merge_lora.py --output_dir saved_files/laptop --format chatglm.cpp --dtype q4_0

The merged model needs no adapter: this project and the official code load it like the original. The official code is
copied if its *.py files are in the base model's folder. With --format chatglm.cpp the folder has the one file
that chatglm.cpp runs, and the licence if there is one.
"""

import shutil
from dataclasses import dataclass, field
from pathlib import Path

from qlora.arguments import COMPUTE_DTYPES, DEFAULT_ADAPTER, DEFAULT_MODEL, DownloadArguments, in_repository
from qlora.command_line import parse_command_line
from qlora.errors import message_instead_of_traceback, one_line_on_interrupt, set_up_logging

GGML_FILE = "chatglm-ggml.bin"
LICENCE = "*LICENSE*"
# Beside the tokenizer's files; to the official code config.json refers if it is copied.
COPIED = {"official": ("generation_config.json", "*.py", LICENCE), "chatglm.cpp": (LICENCE,)}
DTYPES_OF = {"official": ("fp16", "bf16", "int8", "int4"), "chatglm.cpp": ("fp16", "q8_0", "q4_0")}
WEIGHTS = {
    "nf4": "the 4-bit weights that training sees, dequantized",
    "original": "the original 16-bit weights",
}


@dataclass
class MergeArguments(DownloadArguments):
    """What to merge, into which weights, and where to."""

    output_dir: str = field(metadata={"help": "Folder to write; it must not exist."})
    adapter_path: str | None = field(
        default_factory=lambda: in_repository(DEFAULT_ADAPTER),
        metadata={"help": "Folder of the trained adapter; none for the base model alone."},
    )
    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": f"Base model folder; by default that of the adapter's config, or {DEFAULT_MODEL} without one."
        },
    )
    onto: str | None = field(
        default=None,
        metadata={
            "help": "nf4: the weights as training saw them, in 4 bits, dequantized, the default with an adapter; "
            "original: the 16-bit weights.",
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
    format: str = field(
        default="official",
        metadata={
            "help": "Files in the format of THUDM/chatglm-6b, or one file for chatglm.cpp.",
            "choices": list(DTYPES_OF),
        },
    )
    dtype: str = field(
        default="fp16",
        metadata={
            "help": "Type of the written weights: official fp16, bf16, int8 or int4; chatglm.cpp fp16, q8_0 or q4_0.",
            "choices": sorted({dtype for dtypes in DTYPES_OF.values() for dtype in dtypes}),
        },
    )

    def __post_init__(self):
        if self.dtype not in DTYPES_OF[self.format]:
            expected = ", ".join(DTYPES_OF[self.format])
            raise ValueError(f"--dtype {self.dtype} is not of --format {self.format}: expected one of {expected}.")
        if self.adapter_path in ("none", ""):
            self.adapter_path = None
            self.model_name_or_path = self.model_name_or_path or in_repository(DEFAULT_MODEL)
        self.onto = self.onto or ("nf4" if self.adapter_path else "original")


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
    from qlora.export.ggml import write_ggml
    from qlora.export.merging import merged_tensors
    from qlora.export.official_folder import write_checkpoint
    from qlora.hub.fetch import fetch_model
    from qlora.loading import DTYPES, load_tokenizer

    base_path = args.model_name_or_path or base_model_path(args.adapter_path)
    fetch_model(base_path, args)
    config, tensor = merged_tensors(base_path, args.adapter_path, args.onto, DTYPES[args.compute_dtype])
    tokenizer = load_tokenizer(base_path)
    with atomic_folder(args.output_dir) as folder:
        folder.mkdir(parents=True)
        of_tokenizer = tokenizer_files(Path(base_path)) if args.format == "official" else ()
        patterns = (*of_tokenizer, *COPIED[args.format])
        for file in [file for pattern in patterns for file in Path(base_path).glob(pattern)]:
            shutil.copyfile(file, folder / file.name)
        if args.format == "official":
            tokenizer.save_chat_templates(folder, {}, None, save_jinja_files=True)
            write_checkpoint(folder, config, tensor, dtype=args.dtype)
        else:
            write_ggml(folder / GGML_FILE, config, tokenizer, tensor, args.dtype)
    weights = f"{WEIGHTS[args.onto]} ({base_path})"
    source = f"Merged {args.adapter_path} into {weights}" if args.adapter_path else f"Read {weights}"
    print(f"{source}; wrote {args.output_dir} in {args.dtype}")


if __name__ == "__main__":
    main()
