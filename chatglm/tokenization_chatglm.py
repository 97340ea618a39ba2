"""Tokenizer of ChatGLM-6B, with the SentencePiece model `ice_text.model`, whose piece ids are the token ids."""

import re

import sentencepiece

from chatglm.chat import CHAT_TEMPLATE, FULL_WIDTH_MARKS, MARKS, OFFICIAL_SAMPLING, build_prompt, clean_response
from glm_shared.chat import ChatTokenizer, Rounds

MAX_BLANKS = 80  # there is a piece for each run of 2 to 80 spaces
RUN_OF_SPACES = re.compile(f" {{2,{MAX_BLANKS}}}")
BLANK_PIECE = re.compile(r"<\|blank_([2-9]|[1-7][0-9]|80)\|>")  # as text, any other number is not such a piece


class ChatGLMTokenizer(ChatTokenizer):
    """SentencePiece with pieces for newline, tab and runs of spaces; adds the control tokens that the model expects.

    `encode(text)` gives `text [gMASK] <sop>`; a pair gives `text [gMASK] <sop> pair <eop>`. Padding is on the left,
    since generation appends tokens on the right. Control tokens written in a text (`<sop>`, `<pad>`, ...) become
    control tokens, as in the official tokenizer; with `split_special_tokens=True`, which data rows and prompts need,
    they stay text.

    Args:
        vocab_file: path of `ice_text.model`.
        num_image_tokens: must be 0; the files of early releases, in which the ids of text start at 20,000, do not fit.
        chat_template: for `apply_chat_template`; the official files have none.
    Raises:
        ValueError: `num_image_tokens` is not 0.
    Source: `tokenizer_config.json` and `ice_text.model` of THUDM/chatglm-6b.
    """

    vocab_files_names = {"vocab_file": "ice_text.model"}
    model_input_names = ["input_ids", "attention_mask"]
    prompt_end = 2  # [gMASK] <sop>
    longest_token = MAX_BLANKS
    sampling = OFFICIAL_SAMPLING
    chat_length = 2048
    ggml_type = 1
    open_marks = MARKS
    same_marks = dict(zip(map(ord, FULL_WIDTH_MARKS), MARKS, strict=True))

    def __init__(
        self,
        vocab_file: str,
        bos_token: str = "<sop>",
        eos_token: str = "<eop>",
        unk_token: str = "<unk>",
        pad_token: str = "<pad>",
        mask_token: str = "[MASK]",
        padding_side: str = "left",
        num_image_tokens: int = 0,
        chat_template: str | dict[str, str] | None = CHAT_TEMPLATE,
        **kwargs,
    ):
        if num_image_tokens:
            raise ValueError(
                f"tokenizer_config.json has num_image_tokens={num_image_tokens}: these are files of an early release. "
                "Download the current tokenizer_config.json, config.json and ice_text.model of THUDM/chatglm-6b."
            )
        self.vocab_file = vocab_file
        self.sp_model = sentencepiece.SentencePieceProcessor(model_file=vocab_file)
        # tokenizer_config.json names [gMASK] and </s>, but the official tokenizer does not parse them in a text.
        kwargs.pop("model_specific_special_tokens", None)
        super().__init__(
            bos_token=bos_token,
            eos_token=eos_token,
            unk_token=unk_token,
            pad_token=pad_token,
            mask_token=mask_token,
            padding_side=padding_side,
            num_image_tokens=num_image_tokens,
            chat_template=chat_template,
            **kwargs,
        )

    @property
    def vocab_size(self) -> int:
        """Number of SentencePiece pieces."""
        return self.sp_model.get_piece_size()

    @property
    def gmask_token_id(self) -> int:
        """Id of `[gMASK]`, after which the answer is generated."""
        return self.sp_model.piece_to_id("[gMASK]")

    @property
    def control_token_ids(self) -> list[int]:
        """`[gMASK]`, `<sop>`, `<eop>`."""
        return [self.gmask_token_id, self.bos_token_id, self.eos_token_id]

    def get_vocab(self) -> dict[str, int]:
        """Piece -> id, with added tokens."""
        return {self.sp_model.id_to_piece(i): i for i in range(self.vocab_size)} | self.added_tokens_encoder

    def _tokenize(self, text: str, **kwargs) -> list[str]:
        text = text.replace("\n", "<n>").replace("\t", "<|tab|>")
        text = RUN_OF_SPACES.sub(lambda run: f"<|blank_{len(run.group())}|>", text)
        return self.sp_model.encode(text, out_type=str)

    def _convert_token_to_id(self, token: str) -> int:
        return self.sp_model.piece_to_id(token)

    def _convert_id_to_token(self, index: int) -> str:
        # The embedding has more rows than there are pieces, so that a model can generate an id without a piece.
        return self.sp_model.id_to_piece(index) if index < self.vocab_size else self.unk_token

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of a list of pieces; control tokens give no text."""
        text = self.sp_model.decode_pieces(tokens).replace("<n>", "\n").replace("<|tab|>", "\t")
        return BLANK_PIECE.sub(lambda piece: " " * int(piece.group(1)), text)

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """The ids of `A [gMASK] <sop>`, or of `A [gMASK] <sop> B <eop>` for a pair."""
        answer = [] if token_ids_1 is None else [*token_ids_1, self.eos_token_id]
        return [*token_ids_0, self.gmask_token_id, self.bos_token_id, *answer]

    def build_prompt(self, query: str, history: Rounds = (), system: str = "") -> str:
        """The prompt as the official `chat` builds it."""
        return build_prompt(query, history, system)

    def clean_response(self, text: str) -> str:
        """The reply as the official `chat` formats it."""
        return clean_response(text)


__all__ = ["ChatGLMTokenizer"]
