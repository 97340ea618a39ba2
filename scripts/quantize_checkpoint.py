"""Write a checkpoint in 4 bits, as training and inference use it, so that it is loaded without quantizing again.

    python scripts/quantize_checkpoint.py     # into THUDM/chatglm-6b-nf4, which is then loaded instead
    python scripts/quantize_checkpoint.py --model_name_or_path THUDM/chatglm-6b-merged --output_dir THUDM/merged-nf4

Quantizes on the GPU if there is one.
"""

from dataclasses import dataclass, field
from pathlib import Path

from qlora.arguments import COMPUTE_DTYPES, DEFAULT_MODEL, DownloadArguments, copy_folder, in_repository
from qlora.command_line import parse_command_line
from qlora.errors import message_instead_of_traceback, one_line_on_interrupt, set_up_logging


@dataclass
class QuantizeArguments(DownloadArguments):
    """Which checkpoint, where to, and for which arithmetic."""

    output_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder to write, which must not exist; by default the 4-bit copy beside the model's folder, "
            "which every program then loads instead."
        },
    )
    model_name_or_path: str = field(
        default_factory=lambda: in_repository(DEFAULT_MODEL),
        metadata={"help": "Folder with THUDM/chatglm-6b, chatglm2-6b or chatglm3-6b, or the model's name on a hub."},
    )
    compute_dtype: str = field(
        default="bf16",
        metadata={"help": "Type of the arithmetic it is meant for; others work too.", "choices": list(COMPUTE_DTYPES)},
    )


@one_line_on_interrupt()
def main():
    set_up_logging()
    with message_instead_of_traceback():
        args = parse_command_line(QuantizeArguments)
        quantize(args)


def quantize(args: QuantizeArguments):
    """Loads the model in 4 bits and writes it."""
    # Imported here, since these imports take seconds: a misspelt flag is reported before.
    from qlora.atomic import atomic_folder, write_json
    from qlora.checkpoint import check_checkpoint, is_quantized
    from qlora.export.four_bit_copy import write_quantized
    from qlora.export.merging import check_finite_weights
    from qlora.hub.fetch import fetch_model
    from qlora.loading import COPY_SOURCE, DTYPES, copy_source, load_quantized_model, load_tokenizer

    dtype = DTYPES[args.compute_dtype]
    fetch_model(args.model_name_or_path, args)
    config = check_checkpoint(args.model_name_or_path)
    if is_quantized(config):
        raise ValueError(f"{args.model_name_or_path} is in 4 bits already: use it as it is.")
    tokenizer = load_tokenizer(args.model_name_or_path)
    output_dir = Path(args.output_dir) if args.output_dir else copy_folder(args.model_name_or_path)
    with atomic_folder(output_dir) as folder:
        source = copy_source(args.model_name_or_path, dtype)
        check_finite_weights(args.model_name_or_path, dtype)
        model = load_quantized_model(args.model_name_or_path, dtype, config)
        write_quantized(model, tokenizer, folder)
        write_json(folder / COPY_SOURCE, source)
    size = sum(file.stat().st_size for file in output_dir.iterdir())
    print(f"Wrote {size / 1e9:.1f} GB to {output_dir}")


if __name__ == "__main__":
    main()
