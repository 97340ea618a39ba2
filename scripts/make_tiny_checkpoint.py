"""Make a tiny ChatGLM in the official format, with which training runs without the real weights and without a GPU.

    python scripts/make_tiny_checkpoint.py [--data_path data/train.jsonl] [--output_dir THUDM/chatglm-tiny]
    python scripts/make_tiny_checkpoint.py --architecture chatglm2 --output_dir THUDM/chatglm2-tiny

The tokenizer is trained on the sample rows and has the official layout of special tokens. The model is pre-trained for
about a minute on two tasks made from the same rows: for product attributes alone the answer lists them, and for a
request with attributes it is the advertisement. Fine-tuning on attributes and advertisements changes the answers.
"""

import io
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from qlora.arguments import in_repository
from qlora.command_line import parse_command_line
from qlora.errors import TrainingStopped, message_instead_of_traceback, one_line_on_interrupt

with one_line_on_interrupt():  # these imports take seconds
    import sentencepiece
    import torch
    from sentencepiece import sentencepiece_model_pb2
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

    from chatglm import ChatGLMConfig
    from chatglm.tokenization_chatglm import MAX_BLANKS
    from chatglm2 import ChatGLM2Config, ChatGLM2Tokenizer, ChatGLM3Tokenizer
    from glm_shared.chat import ChatTokenizer
    from glm_shared.description import ModelDescription
    from qlora.atomic import write_json, writing
    from qlora.data.dataset import SampleEncoder
    from qlora.data.rows import read_rows
    from qlora.export.official_folder import write_checkpoint
    from qlora.training.trainer import QLoRATrainer

ASK_FOR_AD = "写一段广告："
CONTROL = ("[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>")
WHITESPACE = ("<|tab|>", *(f"<|blank_{n}|>" for n in range(2, MAX_BLANKS + 1)))
SHAPE = {"hidden_size": 128, "num_layers": 4, "num_attention_heads": 4}
VERSIONS = {"chatglm2": 2, "chatglm3": 3}  # whose tokenizer and model have the layout of ChatGLM2-6B


@dataclass
class TinyCheckpointArguments:
    """From which rows, where to, how long."""

    data_path: str = field(
        default_factory=lambda: in_repository("data/train.jsonl"),
        metadata={"help": "Rows in ADGEN's format to learn from."},
    )
    architecture: str = field(
        default="chatglm",
        metadata={"help": "Model to make a tiny one of.", "choices": ["chatglm", *VERSIONS]},
    )
    output_dir: str | None = field(
        default=None, metadata={"help": "Folder to write; by default THUDM/chatglm-tiny, named like the architecture."}
    )
    vocab_size: int = field(default=3000, metadata={"help": "Number of SentencePiece pieces."})
    max_steps: int = field(default=540, metadata={"help": "Pre-training steps of 16 rows; 0 for random weights."})
    seed: int = field(default=0, metadata={"help": "Random seed."})


@one_line_on_interrupt()
def main():
    with message_instead_of_traceback():
        args = parse_command_line(TinyCheckpointArguments)
        rows = list(read_rows(args.data_path))
    target = Path(args.output_dir or in_repository(f"THUDM/{args.architecture}-tiny"))
    with message_instead_of_traceback(TrainingStopped, OSError), writing(target):
        target.mkdir(parents=True, exist_ok=True)
        tokenizer = make_tokenizer(rows, args.vocab_size, target, args.architecture)
        model = pretrain(rows, tokenizer, args.max_steps, args.seed)
        state = model.state_dict()
        write_checkpoint(target, model.config, lambda name, shape: state[name])
    print(f"{target}: a ChatGLM of {model.num_parameters() / 1e6:.1f} million parameters in the official format")


def make_tokenizer(rows: list[dict], vocab_size: int, target: Path, architecture: str = "chatglm") -> ChatTokenizer:
    """Trains SentencePiece on the rows, with the official layout of pieces and special tokens.

    Args:
        rows: with `query` and `answer`.
        vocab_size: number of pieces.
        target: folder for the tokenizer's two files.
        architecture: of the model.
    """
    texts = [
        text for row in rows for text in (ASK_FOR_AD + row["query"], row["answer"], plain_description(row["query"]))
    ]
    train = train_grouped if architecture in VERSIONS else train_first
    train(texts, vocab_size, target)
    config = {"tokenizer_class": "ChatGLMTokenizer"}
    if architecture in VERSIONS:
        config |= {"chatglm_version": VERSIONS[architecture], "do_lower_case": False, "remove_space": False}
    else:
        config |= {"bos_token": "<sop>", "eos_token": "<eop>", "end_token": "</s>", "gmask_token": "[gMASK]"}
        config |= {"mask_token": "[MASK]", "pad_token": "<pad>", "unk_token": "<unk>"}
    write_json(target / "tokenizer_config.json", config)
    return AutoTokenizer.from_pretrained(target)


def train_pieces(texts: list[str], vocab_size: int, **options) -> bytes:
    """A serialized SentencePiece model."""
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=trained,
        vocab_size=vocab_size,
        character_coverage=1.0,
        split_digits=True,
        byte_fallback=True,
        minloglevel=2,
        num_threads=1,
        **options,
    )
    return trained.getvalue()


def train_first(texts: list[str], vocab_size: int, target: Path):
    """Writes the ice_text.model of ChatGLM-6B."""
    learned = vocab_size - len(CONTROL) - len(WHITESPACE)
    pieces = train_pieces(texts, learned, pad_id=3, user_defined_symbols=["<n>"])
    (target / "ice_text.model").write_bytes(official_layout(pieces))


def train_grouped(texts: list[str], vocab_size: int, target: Path):
    """Writes the tokenizer.model of ChatGLM2-6B: <unk> <s> </s>, the bytes, the learned pieces; the text as it is."""
    as_it_is = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    pieces = train_pieces(texts, vocab_size, model_type="bpe", **as_it_is)
    (target / "tokenizer.model").write_bytes(pieces)


def official_layout(serialized: bytes) -> bytes:
    """Reorders a serialized SentencePiece model.

    The order is <unk> <s> </s> <pad> <n>, the learned pieces, the control tokens, the whitespace pieces, the bytes.
    """
    model = sentencepiece_model_pb2.ModelProto.FromString(serialized)
    piece = sentencepiece_model_pb2.ModelProto.SentencePiece
    learned = [p for p in model.pieces if p.type != piece.BYTE]
    byte_pieces = [p for p in model.pieces if p.type == piece.BYTE]
    control = [piece(piece=name, score=0.0, type=piece.CONTROL) for name in CONTROL]
    whitespace = [piece(piece=name, score=0.0, type=piece.USER_DEFINED) for name in WHITESPACE]
    pieces = [piece.FromString(p.SerializeToString()) for p in learned + control + whitespace + byte_pieces]
    del model.pieces[:]
    model.pieces.extend(pieces)
    return model.SerializeToString()


def plain_description(attributes: str) -> str:
    """`类型#裤*版型#宽松` -> `这是一件商品。类型是裤。版型是宽松。`"""
    pairs = [attribute.split("#", 1) for attribute in attributes.split("*")]
    return "这是一件商品。" + "".join(f"{pair[0]}是{pair[-1]}。" for pair in pairs)


def pretrain(rows: list[dict], tokenizer: ChatTokenizer, max_steps: int, seed: int):
    """Trains all weights of a new model; one half of the samples are plain descriptions, the other advertisements."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(tokenizer), dtype=torch.float32)
    if max_steps == 0:
        return model
    encoder = SampleEncoder(tokenizer, "", 512, 512)
    plain = [(row["query"], plain_description(row["query"])) for row in rows]
    requested = [(ASK_FOR_AD + row["query"], row["answer"]) for row in rows]
    samples = []
    for query, answer in plain + requested:
        input_ids, labels, *_ = encoder.encode(query, [], answer)
        samples.append({"input_ids": input_ids, "labels": labels})
    with tempfile.TemporaryDirectory() as scratch:
        training_args = TrainingArguments(
            output_dir=scratch,
            per_device_train_batch_size=16,
            max_steps=max_steps,
            learning_rate=3e-3,
            lr_scheduler_type="cosine",
            warmup_steps=20,
            logging_steps=50,
            save_strategy="no",
            report_to="none",
            dataloader_pin_memory=False,
            use_cpu=not torch.cuda.is_available(),  # not Apple's GPU
            seed=seed,
        )
        QLoRATrainer(model, training_args, max_tokens=2048, train_dataset=samples).train()
    model.config.use_cache = True  # the Trainer sets it to False
    return model


def tiny_config(tokenizer: ChatTokenizer) -> ModelDescription:
    """The architecture of the tokenizer's model, in a size that is trained on a CPU in a minute."""
    padded_vocab_size = (len(tokenizer) + 63) // 64 * 64
    if isinstance(tokenizer, ChatGLM2Tokenizer):
        sizes = {"kv_channels": 32, "multi_query_group_num": 2, "ffn_hidden_size": 352, "seq_length": 2048}
        version = 3 if isinstance(tokenizer, ChatGLM3Tokenizer) else 2
        return ChatGLM2Config(
            padded_vocab_size=padded_vocab_size, initializer_range=0.05, chatglm_version=version, **SHAPE, **sizes
        )
    ids = {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad", "mask", "gmask")
    }
    return ChatGLMConfig(vocab_size=padded_vocab_size, initializer_range=0.05, inner_hidden_size=512, **SHAPE, **ids)


if __name__ == "__main__":
    main()
