"""Make a tiny ChatGLM in the official format, with which training runs without the real weights and without a GPU.

    python scripts/make_tiny_checkpoint.py [--data_path data/train.jsonl] [--output_dir THUDM/chatglm-tiny]

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

    from chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration, ChatGLMTokenizer
    from chatglm.tokenization_chatglm import MAX_BLANKS
    from qlora.atomic import write_json
    from qlora.data.dataset import SampleEncoder
    from qlora.data.rows import read_rows
    from qlora.export.official_folder import write_checkpoint
    from qlora.training.trainer import QLoRATrainer, TrainingArguments

ASK_FOR_AD = "写一段广告："
CONTROL = ("[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>")
WHITESPACE = ("<|tab|>", *(f"<|blank_{n}|>" for n in range(2, MAX_BLANKS + 1)))
SHAPE = {"hidden_size": 128, "num_layers": 4, "num_attention_heads": 4, "inner_hidden_size": 512}


@dataclass
class TinyCheckpointArguments:
    """From which rows, where to, how long."""

    data_path: str = field(
        default_factory=lambda: in_repository("data/train.jsonl"),
        metadata={"help": "Rows in ADGEN's format to learn from."},
    )
    output_dir: str = field(
        default_factory=lambda: in_repository("THUDM/chatglm-tiny"), metadata={"help": "Folder to write."}
    )
    vocab_size: int = field(default=3000, metadata={"help": "Number of SentencePiece pieces."})
    max_steps: int = field(default=600, metadata={"help": "Pre-training steps of 16 rows."})
    seed: int = field(default=0, metadata={"help": "Random seed."})


@one_line_on_interrupt()
def main():
    with message_instead_of_traceback():
        args = parse_command_line(TinyCheckpointArguments)
        rows = list(read_rows(args.data_path))
    target = Path(args.output_dir)
    target.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(rows, args.vocab_size, target)
    with message_instead_of_traceback(TrainingStopped):
        model = pretrain(rows, tokenizer, args.max_steps, args.seed)
    state = model.state_dict()
    write_checkpoint(args.output_dir, model.config, lambda name, shape: state[name])
    print(f"{target}: a ChatGLM of {model.num_parameters() / 1e6:.1f} million parameters in the official format")


def make_tokenizer(rows: list[dict], vocab_size: int, target: Path) -> ChatGLMTokenizer:
    """Trains SentencePiece on the rows, and gives the special tokens the official order.

    Args:
        rows: with `query` and `answer`.
        vocab_size: number of pieces.
        target: folder for ice_text.model and tokenizer_config.json.
    """
    texts = [
        text for row in rows for text in (ASK_FOR_AD + row["query"], row["answer"], plain_description(row["query"]))
    ]
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=trained,
        vocab_size=vocab_size - len(CONTROL) - len(WHITESPACE),
        character_coverage=1.0,
        split_digits=True,
        byte_fallback=True,
        pad_id=3,
        user_defined_symbols=["<n>"],
        minloglevel=2,
        num_threads=1,
    )
    (target / "ice_text.model").write_bytes(official_layout(trained.getvalue()))
    special = {"bos_token": "<sop>", "eos_token": "<eop>", "end_token": "</s>", "gmask_token": "[gMASK]"}
    special |= {"mask_token": "[MASK]", "pad_token": "<pad>", "unk_token": "<unk>"}
    write_json(target / "tokenizer_config.json", special | {"tokenizer_class": "ChatGLMTokenizer"})
    return ChatGLMTokenizer.from_pretrained(target)


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


def pretrain(rows: list[dict], tokenizer: ChatGLMTokenizer, max_steps: int, seed: int):
    """Trains all weights of a new model; one half of the samples are plain descriptions, the other advertisements."""
    encoder = SampleEncoder(tokenizer, "", 512, 512)
    plain = [(row["query"], plain_description(row["query"])) for row in rows]
    requested = [(ASK_FOR_AD + row["query"], row["answer"]) for row in rows]
    samples = []
    for query, answer in plain + requested:
        input_ids, labels, *_ = encoder.encode(query, [], answer)
        samples.append({"input_ids": input_ids, "labels": labels})
    torch.manual_seed(seed)
    model = ChatGLMForConditionalGeneration(tiny_config(tokenizer))
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


def tiny_config(tokenizer: ChatGLMTokenizer) -> ChatGLMConfig:
    """The architecture of ChatGLM-6B, in a size that is trained on a CPU in a minute."""
    ids = {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad", "mask", "gmask")
    }
    padded_vocab_size = (tokenizer.vocab_size + 63) // 64 * 64
    return ChatGLMConfig(vocab_size=padded_vocab_size, initializer_range=0.05, **SHAPE, **ids)


if __name__ == "__main__":
    main()
