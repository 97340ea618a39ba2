"""Evaluation protocols: how answers are generated, and to which lengths texts are cut."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Protocol:
    """Settings of an evaluation.

    Attributes:
        do_sample: whether tokens are sampled, with the official settings, or are the most likely ones.
        max_prompt_tokens, max_reference_tokens: most tokens of prompt and reference, control tokens included;
            longer texts are cut. None for no limit.
        max_new_tokens: most tokens of an answer.
    """

    do_sample: bool
    max_prompt_tokens: int | None
    max_reference_tokens: int | None
    max_new_tokens: int


PROTOCOLS = {
    # Source: ptuning/evaluate.sh and ptuning/main.py of ChatGLM-6B: 64 tokens each, 512 of prompt and answer together.
    "published": Protocol(do_sample=True, max_prompt_tokens=64, max_reference_tokens=64, max_new_tokens=448),
    "greedy": Protocol(do_sample=False, max_prompt_tokens=None, max_reference_tokens=None, max_new_tokens=512),
}
