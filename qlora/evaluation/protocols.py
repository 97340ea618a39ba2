"""How answers are made in an evaluation, and what they are compared with."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Protocol:
    """Settings of an evaluation; lengths in tokens, None for no limit.

    Attributes:
        do_sample: sampling with the official settings, `chatglm.chat.OFFICIAL_SAMPLING`, else the most likely token.
        max_prompt_tokens, max_reference_tokens: lengths that these are cut to, `[gMASK]` and `<sop>` included.
        max_new_tokens: longest answer.
    """

    do_sample: bool
    max_prompt_tokens: int | None
    max_reference_tokens: int | None
    max_new_tokens: int


PROTOCOLS = {
    # Source: ptuning/evaluate.sh and ptuning/main.py of ChatGLM-6B: 64 tokens each, 512 for prompt and answer.
    "published": Protocol(do_sample=True, max_prompt_tokens=64, max_reference_tokens=64, max_new_tokens=448),
    "greedy": Protocol(do_sample=False, max_prompt_tokens=None, max_reference_tokens=None, max_new_tokens=512),
}
