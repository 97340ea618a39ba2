"""Tokenizers of ChatGLM2-6B and ChatGLM3-6B: the same SentencePiece model `tokenizer.model`, and other prompts."""

import functools
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
from transformers import BatchEncoding
from transformers.utils import cached_file

from chatglm2.chat import (
    CHAT_LENGTH,
    OFFICIAL_SAMPLING,
    ROLES,
    ROLES_TEMPLATE,
    ROUNDS_TEMPLATE,
    TOOLS_PROMPT,
    build_messages,
    build_rounds,
    clean_response,
)
from chatglm2.configuration_chatglm2 import told_version
from chatglm2.tool_calls import begins_call, build_call, parse_call
from glm_shared.chat import ChatTokenizer, Rounds, ToolCall
from glm_shared.registration import TOKENIZER_CONFIG, UnknownModel, hub_options


class ChatGLM2Tokenizer(ChatTokenizer):
    """SentencePiece, with control tokens whose ids follow those of the pieces; the prompts are those of ChatGLM2-6B.

    `encode(text)` gives `[gMASK] sop text`; a pair gives `[gMASK] sop text pair </s>`. Padding is on the left, since
    generation appends tokens on the right. Control tokens written in a text stay text, as in the official tokenizer.

    Args:
        vocab_file: path of `tokenizer.model`.
        chat_template: for `apply_chat_template`.
    Source: `tokenizer_config.json`, `tokenizer.model` and tokenization_chatglm.py of THUDM/chatglm2-6b.
    """

    vocab_files_names = {"vocab_file": "tokenizer.model"}
    model_input_names = ["input_ids", "attention_mask"]
    control_tokens: tuple[str, ...] = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")
    default_template = ROUNDS_TEMPLATE
    prompt_end = 0
    sampling = OFFICIAL_SAMPLING
    chat_length = CHAT_LENGTH
    ggml_type = 2

    def __init__(
        self,
        vocab_file: str,
        bos_token: str = "<s>",
        eos_token: str = "</s>",
        unk_token: str = "<unk>",
        pad_token: str = "<unk>",
        padding_side: str = "left",
        chat_template: str | dict[str, str] | None = None,
        **kwargs,
    ):
        self.vocab_file = vocab_file
        self.sp_model = sentencepiece.SentencePieceProcessor(model_file=vocab_file)
        pieces = self.sp_model.get_piece_size()
        self.control_ids = {token: pieces + i for i, token in enumerate(self.control_tokens)}
        kwargs["extra_special_tokens"] = list(self.control_tokens)
        for name in ("additional_special_tokens", "added_tokens_decoder", "do_lower_case", "remove_space"):
            kwargs.pop(name, None)
        super().__init__(
            bos_token=bos_token,
            eos_token=eos_token,
            unk_token=unk_token,
            pad_token=pad_token,
            padding_side=padding_side,
            chat_template=chat_template or self.default_template,
            **kwargs,
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, *inputs, **kwargs) -> "ChatGLM2Tokenizer":
        """As `PreTrainedTokenizer.from_pretrained`; of ChatGLM2Tokenizer and ChatGLM3Tokenizer, the one that fits.

        Raises:
            UnknownModel: see `version_of`.
        """
        path = str(pretrained_model_name_or_path)
        if cls is ChatGLM2Tokenizer and version_of(path, hub_options(kwargs)) == 3:
            return ChatGLM3Tokenizer.from_pretrained(path, *inputs, **kwargs)
        return super().from_pretrained(path, *inputs, **kwargs)

    @functools.cached_property
    def longest_token(self) -> int:  # type: ignore[override]
        """Characters of the longest piece."""
        return max(len(self.sp_model.id_to_piece(i)) for i in range(self.sp_model.get_piece_size()))

    @property
    def vocab_size(self) -> int:
        """Number of pieces and control tokens."""
        return self.sp_model.get_piece_size() + len(self.control_tokens)

    @property
    def control_token_ids(self) -> list[int]:
        """`control_tokens`, and `</s>`."""
        return [*self.control_ids.values(), self.eos_token_id]

    def get_vocab(self) -> dict[str, int]:
        """Piece or control token -> id."""
        return {self.sp_model.id_to_piece(i): i for i in range(self.sp_model.get_piece_size())} | self.control_ids

    def tokenize(self, text: str, **kwargs) -> list[str]:
        """The pieces of a text; control tokens are not looked for."""
        return self.sp_model.encode(text, out_type=str)

    def _convert_token_to_id(self, token: str) -> int:
        return self.control_ids.get(token, self.sp_model.piece_to_id(token))

    def _convert_id_to_token(self, index: int) -> str:
        pieces = self.sp_model.get_piece_size()
        if index < pieces:
            return self.sp_model.id_to_piece(index)
        # The embedding has more rows than there are tokens, so that a model can generate an id without a token.
        return self.control_tokens[index - pieces] if index < self.vocab_size else self.unk_token

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of a list of pieces; control tokens give no text."""
        return self.sp_model.decode_pieces([token for token in tokens if token not in self.control_ids])

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """The ids of `[gMASK] sop A`, or of `[gMASK] sop A B </s>` for a pair."""
        pair = [] if token_ids_1 is None else [*token_ids_1, self.eos_token_id]
        return [*self.prefix_ids, *token_ids_0, *pair]

    @property
    def prefix_ids(self) -> list[int]:
        """`[gMASK] sop`, with which every input begins."""
        return [self.control_ids["[gMASK]"], self.control_ids["sop"]]

    def build_prompt(self, query: str, history: Rounds = (), system: str = "") -> str:
        """The prompt as the official `chat` builds it."""
        return build_rounds(query, history, system)

    def clean_response(self, text: str) -> str:
        """The reply as the official `chat` formats it."""
        return clean_response(text)


class ChatGLM3Tokenizer(ChatGLM2Tokenizer):
    """The same with a token for each role, and with the prompts of ChatGLM3-6B.

    Source: tokenization_chatglm.py and modeling_chatglm.py of THUDM/chatglm3-6b.
    """

    control_tokens = (*ChatGLM2Tokenizer.control_tokens, *(f"<|{role}|>" for role in ROLES))
    default_template = ROLES_TEMPLATE
    prompt_end = 1  # <|assistant|>
    ggml_type = 3

    @property
    def stop_token_ids(self) -> list[int]:
        """`</s>`, and the roles that speak after the assistant: the user, or the result of a tool."""
        return [self.eos_token_id, self.role_id("user"), self.role_id("observation")]

    @property
    def message_token_id(self) -> int:  # type: ignore[override]
        """`<|assistant|>`, after which a call may follow a text."""
        return self.role_id("assistant")

    def role_id(self, role: str) -> int:
        """The token of a role."""
        return self.control_ids[f"<|{role}|>"]

    def text_ids(self, text: str) -> list[int]:
        """The ids of a text without control tokens."""
        return self.sp_model.encode(text)

    def message_ids(self, *args, **kwargs) -> list[int]:
        """The ids of one message; arguments as for `message_parts`."""
        role, line, text = self.message_parts(*args, **kwargs)
        return [self.role_id(role), *self.text_ids(line), *self.text_ids(text)]

    def message_parts(
        self, role: str, content: str, metadata: str = "", tools: Any = None, arguments: dict | None = None, **others
    ) -> tuple[str, str, str]:
        """The role of one message, its line of metadata, and its text.

        Args:
            role: one of ROLES; "developer" counts as "system", and "tool" as "observation".
            content: its text.
            metadata: of the assistant, the tool that it calls.
            tools: of the system, descriptions of the tools, which are put below its text as JSON; below the official
                text without one.
            arguments: of a call; its content is made of them.
            others: entries of a message that have no effect.
        """
        role = {"developer": "system", "tool": "observation"}.get(role, role)
        if role not in ROLES:
            raise ValueError(f"a message has the role {role!r}, expected one of {', '.join(ROLES)}")
        if role == "system" and tools:
            content = f"{content or TOOLS_PROMPT}\n{json.dumps(tools, indent=4, ensure_ascii=False)}"
        content = content if arguments is None else build_call(arguments)
        return role, f"{metadata or ''}\n", content

    def conversation_ids(self, messages: Sequence[dict], prompt_text: str = "") -> list[int]:
        """As in the base class; `messages` may have `metadata`, `tools` and `arguments`, see `message_parts`."""
        if prompt_text:
            first, *others = messages
            text = first["content"] or (TOOLS_PROMPT if first.get("tools") else "")
            messages = [first | {"content": prompt_text + text}, *others]
        return [*self.prefix_ids, *self.ids_of_all(messages), self.role_id("assistant")]

    def turn_ids(self, messages: Sequence[dict]) -> list[int]:
        """The messages without the first role; a call ends where its result would begin, an answer with `</s>`."""
        end = self.role_id("observation") if messages[-1].get("metadata") else self.eos_token_id
        return [*self.ids_of_all(messages)[1:], end]

    def ids_of_all(self, messages: Sequence[dict]) -> list[int]:
        """The ids of messages, one after the other."""
        return [i for message in messages for i in self.message_ids(**message)]

    def conversation_text(self, messages: Sequence[dict]) -> str:
        """The prompt as it reads; `conversation_ids` makes its ids, in which a role is one token."""
        parts = (self.message_parts(**message) for message in messages)
        return "".join(f"<|{role}|>{line}{text}" for role, line, text in parts) + "<|assistant|>"

    def build_prompt(self, query: str, history: Rounds = (), system: str = "") -> str:
        """The prompt as it reads; `build_prompt_ids` makes its ids, in which a role is one token."""
        return self.conversation_text(build_messages(query, history, system))

    def build_prompt_ids(self, query: str, history: Rounds = (), system: str = "", prompt_text: str = "") -> list[int]:
        """As for the other models; `prompt_text` is put before the first message's text."""
        return self.conversation_ids(build_messages(query, history, system), prompt_text)

    def build_answer_ids(self, answer: str) -> list[int]:
        """The end of the line for metadata, the answer, and `</s>`."""
        return [*self.text_ids("\n"), *self.text_ids(answer), self.eos_token_id]

    def apply_chat_template(
        self,
        conversation,
        *args,
        tokenize: bool = True,
        return_tensors: str | None = None,
        return_dict: bool = True,
        padding: bool | str = False,
        **kwargs,
    ) -> str | list[int] | list[str] | list[list[int]] | BatchEncoding:
        """As in transformers; text that looks like a role's token stays text."""
        if not tokenize:
            return super().apply_chat_template(conversation, *args, tokenize=False, **kwargs)
        is_batch = bool(conversation) and not isinstance(conversation[0], dict)
        ids = [self.conversation_ids(messages) for messages in (conversation if is_batch else [conversation])]
        if not return_dict and return_tensors is None and not padding:
            return ids if is_batch else ids[0]
        if not is_batch and return_tensors is None:
            batch = self.pad({"input_ids": ids[0]}, padding=padding)
        else:
            batch = self.pad({"input_ids": ids}, padding=padding or len(ids) > 1, return_tensors=return_tensors)
        return batch if return_dict else batch["input_ids"]

    def begins_call(self, text: str, tools: Collection[str]) -> bool:
        """See `chatglm2.tool_calls.begins_call`."""
        return begins_call(text, tools)

    def parse_call(self, text: str, tools: Collection[str]) -> ToolCall | None:
        """See `chatglm2.tool_calls.parse_call`."""
        return parse_call(text, tools)


def version_of(path: str, options: dict) -> int:
    """2 or 3, by the files of a tokenizer.

    Args:
        path: of a folder, or name on the Hub.
        options: of transformers' `cached_file`.
    Raises:
        UnknownModel: they do not say it, or contradict each other.
    """
    told = {}
    for name in (TOKENIZER_CONFIG, "config.json"):
        file = cached_file(path, name, _raise_exceptions_for_missing_entries=False, **options)
        told[name] = told_version(json.loads(Path(file).read_text(encoding="utf-8"))) if file else None
    versions = {version for version in told.values() if version}
    if len(versions) == 1:
        return versions.pop()
    if versions:
        found = " and ".join(f"{name} is that of ChatGLM{version}-6B" for name, version in told.items())
        raise UnknownModel(f"{path}: {found}: they do not belong together. Download both again.")
    raise UnknownModel(
        f"{path}: nothing in tokenizer_config.json and config.json says whether the model is ChatGLM2-6B or "
        'ChatGLM3-6B, whose prompts differ. Add "chatglm_version": 2 or 3 to tokenizer_config.json.'
    )


__all__ = ["ChatGLM2Tokenizer", "ChatGLM3Tokenizer"]
