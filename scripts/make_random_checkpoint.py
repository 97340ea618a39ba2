"""Write a checkpoint of random weights in the official format, to measure speed and memory without the real weights.

    python scripts/make_random_checkpoint.py --tokenizer_path THUDM/chatglm-6b --output_dir THUDM/chatglm-6b-random

The default size is that of ChatGLM-6B (13 GB on disk). Weights are drawn on the GPU if there is one.
"""

import shutil
from dataclasses import dataclass, field
from pathlib import Path

from qlora.command_line import parse_command_line
from qlora.errors import message_instead_of_traceback, one_line_on_interrupt

with one_line_on_interrupt():  # these imports take seconds
    import torch

    from chatglm import ChatGLMConfig
    from qlora.checkpoint import tokenizer_files
    from qlora.export.official_folder import write_checkpoint


@dataclass
class RandomCheckpointArguments:
    """Where to, with which tokenizer, and how large."""

    tokenizer_path: str = field(metadata={"help": "Folder with ice_text.model, tokenizer_config.json, config.json."})
    output_dir: str = field(metadata={"help": "Folder to write."})
    num_layers: int | None = field(default=None, metadata={"help": "Number of layers; by default the config's."})
    hidden_size: int | None = field(default=None, metadata={"help": "Width; the MLP is four times as wide."})
    num_attention_heads: int | None = field(default=None, metadata={"help": "Heads; by default the config's."})
    seed: int = field(default=0, metadata={"help": "Random seed."})


@one_line_on_interrupt()
def main():
    with message_instead_of_traceback():
        args = parse_command_line(RandomCheckpointArguments)
        config = ChatGLMConfig.from_pretrained(args.tokenizer_path, **chosen_sizes(args))
        target = Path(args.output_dir)
        target.mkdir(parents=True, exist_ok=True)
        for name in tokenizer_files(Path(args.tokenizer_path)):
            shutil.copyfile(Path(args.tokenizer_path) / name, target / name)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        generator = torch.Generator(device).manual_seed(args.seed)
        embedding = random_weight(
            "transformer.word_embeddings.weight", (config.vocab_size, config.hidden_size), generator
        )

        def tensor(name: str, shape: torch.Size) -> torch.Tensor:
            return embedding if "word_embeddings" in name else random_weight(name, shape, generator)

        write_checkpoint(args.output_dir, config, tensor)
    print(f"Wrote {sum(f.stat().st_size for f in target.iterdir()) / 1e9:.1f} GB to {target}")


def chosen_sizes(args: RandomCheckpointArguments) -> dict[str, int]:
    """The sizes that were given as flags, as keys of the configuration."""
    sizes = {name: getattr(args, name) for name in ("num_layers", "hidden_size", "num_attention_heads")}
    if args.hidden_size:
        sizes["inner_hidden_size"] = 4 * args.hidden_size
    return {name: value for name, value in sizes.items() if value is not None}


def random_weight(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Ones for the weights of norms, zeros for biases, normal values with standard deviation 0.02 for matrices."""
    if name.endswith("layernorm.weight"):
        return torch.ones(shape)
    if name.endswith(".bias"):
        return torch.zeros(shape)
    return torch.empty(shape, dtype=torch.float16, device=generator.device).normal_(0, 0.02, generator=generator)


if __name__ == "__main__":
    main()
