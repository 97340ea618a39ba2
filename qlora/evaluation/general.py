"""How far fine-tuning moved the answers to general prompts, and whether they turned into the task that was trained.

Texts are compared in units: a run of Latin letters and digits, or any other character that is not a space.
"""

import json
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from statistics import fmean, quantiles

from qlora.arguments import REPOSITORY
from qlora.data.rows import read_rows

GENERAL_PROMPTS = REPOSITORY / "data" / "general.jsonl"
TASK_OUTPUTS = 200  # at most so many of the task's outputs are compared with
NGRAM, WINDOW = 3, 4  # characters compared with the task's; units that count as a repetition
COLUMNS = {  # of the table: heading -> measures, of which two are before and after
    "prompts": ("prompts",),
    "characters": ("length_base", "length_adapter"),
    "repeated %": ("repeated_base", "repeated_adapter"),
    "right %": ("right_base", "right_adapter"),
    "ROUGE-L": ("rouge_l",),
    "turned %": ("turned",),
}
MEASURES = [name for names in COLUMNS.values() for name in names]


def read_general_prompts() -> list[dict]:
    """The rows of data/general.jsonl: `category`, `instruction`, and `expected` where there is one right answer."""
    return [json.loads(line) for line in GENERAL_PROMPTS.read_text(encoding="utf-8").splitlines()]


def normalized(text: str) -> str:
    """The text in lower case and with half-width punctuation, as the tokenizer makes it."""
    return unicodedata.normalize("NFKC", text).lower()


def units(text: str) -> list[str]:
    """See the top of this module."""
    return re.findall(r"[a-z0-9]+|\S", normalized(text))


def repetition(text: str) -> float:
    """Percentage of the runs of four units that stand earlier in the text, too; 0 for a text without such runs."""
    words = units(text)
    windows = [tuple(words[i : i + WINDOW]) for i in range(len(words) - WINDOW + 1)]
    return 100 * (1 - len(set(windows)) / len(windows)) if windows else 0.0


def rouge_l(one: str, other: str) -> float:
    """ROUGE-L of two texts in percent: the F1 score of their longest common subsequence of units.

    Source: https://aclanthology.org/W04-1013
    """
    first, second = units(one), units(other)
    if not first and not second:
        return 100.0
    return 200 * common_subsequence(first, second) / (len(first) + len(second))


def common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence, a row of the usual table in the bits of an integer at a time.

    Source: Hyyrö, Bit-parallel LCS-length computation revisited (2004).
    """
    positions: defaultdict[str, int] = defaultdict(int)
    for index, unit in enumerate(first):
        positions[unit] |= 1 << index
    ones = row = (1 << len(first)) - 1
    for unit in second:
        matches = row & positions[unit]
        row = (row + matches | row - matches) & ones
    return len(first) - row.bit_count()


def is_right(answer: str, expected: str) -> bool:
    """Whether the expected words or number stand in an answer, and not as a part of a longer word or number."""
    pattern = rf"(?<![a-z0-9])(?<!\d[.,]){re.escape(normalized(expected))}(?![a-z0-9]|[.,]\d)"
    return re.search(pattern, normalized(answer)) is not None


def ngrams(text: str) -> set[str]:
    """The runs of three characters in a text without spaces, its start and its end included."""
    characters = f"\x02{''.join(normalized(text).split())}\x03"
    return {characters[i : i + NGRAM] for i in range(len(characters) - NGRAM + 1)}


class Task:
    """What the outputs of the trained task look like.

    Attributes:
        threshold: nineteen of twenty outputs share at least this percentage of their n-grams with the others.
    """

    def __init__(self, outputs: list[str]):
        """
        Args:
            outputs: of the task; 200 of them, at equal distances, are used.
        """
        samples = list(map(ngrams, outputs[:: -(-len(outputs) // TASK_OUTPUTS)]))
        self.counts = Counter(ngram for sample in samples for ngram in sample)
        shares = [self.share(sample, at_least=2) for sample in samples]  # 1 is its own
        self.threshold = quantiles(shares, n=20, method="inclusive")[0] if len(shares) > 1 else 100.0

    def share(self, found: set[str], at_least: int = 1) -> float:
        """Percentage of n-grams that stand in at least so many outputs of the task."""
        return 100 * fmean(self.counts[ngram] >= at_least for ngram in found) if found else 0.0

    def resembles(self, answer: str) -> bool:
        """Whether an answer has as many n-grams of the task as the task's own outputs."""
        return bool(answer.strip()) and self.share(ngrams(answer)) >= self.threshold


def read_task(path: str) -> Task:
    """The task of a file of data rows; errors as for `read_rows`."""
    return Task([row["answer"] for row in read_rows(path)])


def compare(row: dict, task: Task) -> dict:
    """The measures of one prompt.

    Args:
        row: with the answers `base` and `adapter` and, where there is one, `expected`.
        task: that the adapter was trained on.
    Returns:
        Name in `MEASURES`, without `prompts` -> number; `right_...` is missing where nothing is expected.
    """
    measures: dict[str, float] = {"rouge_l": rouge_l(row["base"], row["adapter"])}
    for model in ("base", "adapter"):
        measures[f"length_{model}"] = len(row[model].strip())
        measures[f"repeated_{model}"] = repetition(row[model])
        if "expected" in row:
            measures[f"right_{model}"] = 100 * is_right(row[model], row["expected"])
    measures["turned"] = 100 * (task.resembles(row["adapter"]) and not task.resembles(row["base"]))
    return {name: round(value, 2) for name, value in measures.items()}


def summarize_categories(rows: list[dict]) -> dict[str, dict[str, float]]:
    """Category, and `all` -> name in `MEASURES` -> number of prompts, or mean of the `measures` of its rows."""
    categories: dict[str, list[dict]] = {}
    for row in rows:
        categories.setdefault(row["category"], []).append(row["measures"])
    categories["all"] = [row["measures"] for row in rows]
    return {category: {"prompts": len(found), **means(found)} for category, found in categories.items()}


def means(measures: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each measure over the rows that have it."""
    values = {name: [row[name] for row in measures if name in row] for name in MEASURES}
    return {name: fmean(found) for name, found in values.items() if found}


def cells(row: dict[str, float]) -> list[str]:
    """A row of the table, in the order of `COLUMNS`; empty where nothing was measured."""
    return [" → ".join(f"{row[name]:.0f}" for name in names if name in row) for names in COLUMNS.values()]


def format_table(table: dict[str, dict[str, float]]) -> str:
    """What `summarize_categories` returns, as a table in Markdown, which can be read as plain text, too."""
    lines = [["category", *COLUMNS], *([category, *cells(row)] for category, row in table.items())]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    return "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines)
