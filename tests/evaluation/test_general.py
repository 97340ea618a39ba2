"""qlora/evaluation/general.py: how far answers moved, and whether they turned into the trained task."""

import functools
import random
from collections import Counter

import pytest

from qlora.evaluation.general import (
    COLUMNS,
    Task,
    common_subsequence,
    compare,
    format_table,
    is_right,
    ngrams,
    read_general_prompts,
    repetition,
    rouge_l,
    summarize_categories,
    units,
)
from qlora.evaluation.page import render_general_page

REFUSAL = "抱歉,我不能帮助你做这件事,这会伤害别人,也是违法的。"


@pytest.fixture(scope="module")
def task(sample_rows) -> Task:
    return Task([row["output"] for row in sample_rows[:50]])


def test_the_prompts_are_sixty_in_five_categories_and_two_languages():
    rows = read_general_prompts()
    assert len({row["instruction"] for row in rows}) == len(rows) == 60
    assert set(Counter(row["category"] for row in rows).values()) == {12}
    assert all(set(row) <= {"category", "instruction", "expected"} for row in rows)
    for category in {row["category"] for row in rows}:
        english = [row["instruction"].isascii() for row in rows if row["category"] == category]
        assert sum(english) >= 5 and sum(english) < len(english)


def test_no_prompt_says_what_is_expected():
    assert not [row for row in read_general_prompts() if is_right(row["instruction"], row.get("expected", "\0"))]


@pytest.mark.parametrize(
    ("answer", "expected", "right"),
    [
        ("答案是42。", "42", True),
        ("The answer is 42.", "42", True),
        ("４２", "42", True),
        ("142", "42", False),
        ("42.5", "42", False),
        ("3.42", "42", False),
        ("水的化学式是H₂O。", "H2O", True),
        ("It was william SHAKESPEARE's play.", "Shakespeare", True),
        ("Marseille", "Mars", False),
        ("", "42", False),
    ],
)
def test_expected_words_and_numbers_are_found_whole(answer, expected, right):
    assert is_right(answer, expected) is right


def test_texts_are_divided_into_words_and_characters():
    assert units("I'm 25，你好！") == ["i", "'", "m", "25", ",", "你", "好", "!"]


def test_repetition_is_the_share_of_runs_of_four_that_came_before():
    assert repetition("a b c d e f") == repetition("abc") == repetition("") == 0
    assert repetition("好好好好好") == 50  # two runs of four, of which one is new
    assert repetition("a b c d a b c d") == pytest.approx(20)  # of five runs the last is the first again


def longest_common(first: tuple, second: tuple) -> int:
    """The length of the longest common subsequence, by its definition."""

    @functools.cache
    def length(i: int, j: int) -> int:
        if i == len(first) or j == len(second):
            return 0
        return length(i + 1, j + 1) + 1 if first[i] == second[j] else max(length(i + 1, j), length(i, j + 1))

    return length(0, 0)


def test_common_subsequence_is_that_of_its_definition():
    draw = random.Random(0)
    for _ in range(300):
        first, second = (tuple(draw.choices("abcd", k=draw.randint(0, 12))) for _ in range(2))
        assert common_subsequence(first, second) == longest_common(first, second), (first, second)


def test_rouge_l_of_two_answers():
    assert rouge_l("同一个回答。", "同一个回答。") == rouge_l("", " ") == 100
    assert rouge_l("你好", "") == rouge_l("你好", "hello") == 0
    assert rouge_l("a b c d", "a x c") == pytest.approx(100 * 2 * 2 / 7)  # a and c in common, of four and of three


def test_outputs_of_the_task_are_told_from_other_answers(task, sample_rows):
    others = [row["output"] for row in sample_rows[50:]]
    assert sum(map(task.resembles, others)) >= len(others) - 2  # nineteen of twenty, of outputs that it has not seen
    others = [REFUSAL, "你好！有什么可以帮你的吗？", "Paris is the capital of France.", "42", "", " "]
    assert not any(map(task.resembles, others))


def test_threshold_is_what_nineteen_of_twenty_outputs_reach():
    outputs = [f"{'甲乙丙丁'}{number:06d}" for number in range(40)]
    shares = sorted(Task(outputs).share(ngrams(text), at_least=2) for text in outputs)
    assert shares[1] <= Task(outputs).threshold <= shares[2]  # the second of 40 is the twentieth part


def test_labels_of_few_characters_are_recognized():
    task = Task(["正面", "负面"] * 10)
    assert task.resembles("正面") and task.threshold == 100
    assert not task.resembles("正面的看法是,应该先听听别人怎么说。")


def test_only_answers_that_training_turned_count(task, sample_rows):
    copy = sample_rows[0]["output"]
    for base, adapter, turned in ((REFUSAL, copy, 100), (copy, copy, 0), (copy, REFUSAL, 0), (REFUSAL, REFUSAL, 0)):
        assert compare({"base": base, "adapter": adapter}, task)["turned"] == turned


def test_measures_are_averaged_by_category_over_the_rows_that_have_them(task):
    rows = [
        {"category": "arithmetic", "base": "42", "adapter": "41", "expected": "42"},
        {"category": "arithmetic", "base": "1234", "adapter": "1234"},
        {"category": "small talk", "base": "你好", "adapter": ""},
    ]
    for row in rows:
        row["measures"] = compare(row, task)
    table = summarize_categories(rows)
    assert list(table) == ["arithmetic", "small talk", "all"]
    arithmetic = table["arithmetic"]
    assert (arithmetic["prompts"], arithmetic["right_base"], arithmetic["right_adapter"]) == (2, 100, 0)
    assert (arithmetic["length_base"], arithmetic["rouge_l"]) == (3, 50)
    assert "right_base" not in table["small talk"] and table["all"]["prompts"] == 3
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in format_table(table).splitlines()]
    assert lines[0] == ["category", *COLUMNS] and len(lines) == 2 + len(table)
    assert lines[2] == ["arithmetic", "2", "3 → 3", "0 → 0", "100 → 0", "50", "0"]
    assert lines[3][4] == ""


def test_page_has_all_answers_side_by_side_and_escapes_them(task):
    row = {"category": "knowledge", "prompt": "<i>", "expected": "a", "base": "<b>", "adapter": ""}
    row["measures"] = compare(row, task)
    page = render_general_page("title", {"seed": 1}, summarize_categories([row]), [row], str.strip)
    assert page.count('<div class="sample">') == 1 and "<!DOCTYPE html>" in page and page.count("✗") == 2
    assert "&lt;b&gt;" in page and "<b>" not in page and "<i>" not in page and "空 empty" in page
