"""Write a checkpoint of random weights in the official format, to measure speed and memory without the real weights.

    python scripts/make_random_checkpoint.py --tokenizer_path THUDM/chatglm-6b --output_dir THUDM/chatglm-6b-random
    python scripts/make_random_checkpoint.py --tokenizer_path THUDM/chatglm2-6b --output_dir THUDM/chatglm2-6b-random

The model is that of the config.json in the tokenizer's folder; its size is that of this file (13 GB on disk) unless
flags say otherwise. Weights are drawn on the GPU if there is one.
"""

import shutil
from dataclasses import dataclass, field
from pathlib import Path

from qlora.command_line import parse_command_line
from qlora.errors import message_instead_of_traceback, one_line_on_interrupt

with one_line_on_interrupt():  # these imports take seconds
    import torch

    from glm_shared.description import ModelDescription
    from qlora.atomic import writing
    from qlora.checkpoint import read_config, tokenizer_files
    from qlora.export.official_folder import write_checkpoint


@dataclass
class RandomCheckpointArguments:
    """Where to, with which tokenizer, and how large."""

    tokenizer_path: str = field(metadata={"help": "Folder with the files of the tokenizer, and config.json."})
    output_dir: str = field(metadata={"help": "Folder to write."})
    num_layers: int | None = field(default=None, metadata={"help": "Number of layers; by default the config's."})
    hidden_size: int | None = field(default=None, metadata={"help": "Width; that of the MLP changes in proportion."})
    num_attention_heads: int | None = field(default=None, metadata={"help": "Heads; by default the config's."})
    seed: int = field(default=0, metadata={"help": "Random seed."})


@one_line_on_interrupt()
def main():
    with message_instead_of_traceback():
        args = parse_command_line(RandomCheckpointArguments)
        config = read_config(Path(args.tokenizer_path))
        set_sizes(config, args)
        target = Path(args.output_dir)
        with writing(target):
            write_random(target, config, Path(args.tokenizer_path), args.seed)
    print(f"Wrote {sum(f.stat().st_size for f in target.iterdir()) / 1e9:.1f} GB to {target}")


def write_random(target: Path, config: ModelDescription, tokenizer_path: Path, seed: int):
    """Writes a folder with random weights and the files of a tokenizer."""
    target.mkdir(parents=True, exist_ok=True)
    for name in tokenizer_files(tokenizer_path):
        shutil.copyfile(tokenizer_path / name, target / name)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(seed)
    embeddings: dict[str, torch.Tensor] = {}  # kept, since a head that is the same tensor is written after it

    def tensor(name: str, shape: torch.Size) -> torch.Tensor:
        if "word_embeddings" not in name:
            return random_weight(name, shape, generator)
        if name not in embeddings:
            embeddings[name] = random_weight(name, shape, generator)
        return embeddings[name]

    write_checkpoint(target, config, tensor)


def set_sizes(config: ModelDescription, args: RandomCheckpointArguments):
    """Sets the sizes that were given as flags."""
    if args.hidden_size:
        config.intermediate_size = config.intermediate_size * args.hidden_size // config.hidden_size
        config.hidden_size = args.hidden_size
    config.num_hidden_layers = args.num_layers or config.num_hidden_layers
    config.num_attention_heads = args.num_attention_heads or config.num_attention_heads


def random_weight(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Ones for the weights of norms, zeros for biases, normal values with standard deviation 0.02 for matrices."""
    if name.endswith("layernorm.weight"):
        return torch.ones(shape)
    if name.endswith(".bias"):
        return torch.zeros(shape)
    return torch.empty(shape, dtype=torch.float16, device=generator.device).normal_(0, 0.02, generator=generator)


if __name__ == "__main__":
    main()
