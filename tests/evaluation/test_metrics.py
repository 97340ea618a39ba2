"""qlora/evaluation/metrics.py: the scores equal those of the libraries for the same texts."""

import importlib.util
import itertools
import random

import pytest

from qlora.evaluation.metrics import METRICS, check_metric_libraries, mean_scores, score

jieba = pytest.importorskip("jieba")
rouge_chinese = pytest.importorskip("rouge_chinese")
bleu_score = pytest.importorskip("nltk.translate.bleu_score")

PAIRS = [
    ("这条裙子简约大方,显瘦百搭。", "简约的连衣裙,显瘦又百搭。领口的设计很别致!"),
    ("这条裙子简约大方,显瘦百搭。", "这条裙子简约大方,显瘦百搭。"),
    ("裙", "简约的连衣裙"),
    ("a b", "ok"),
    ("。。。", "简约的连衣裙。"),
    ("完全不同", "简约大方百搭"),
]


def scores_of_libraries(prediction: str, reference: str) -> dict[str, float]:
    """The scores as the libraries compute them."""
    words = [" ".join(jieba.cut(text)) for text in (prediction, reference)]
    rouge = rouge_chinese.Rouge().get_scores(*words)[0]
    smoothing = bleu_score.SmoothingFunction().method3
    bleu = bleu_score.sentence_bleu([list(reference)], list(prediction), smoothing_function=smoothing)
    return {"bleu-4": 100 * bleu} | {name: 100 * rouge[name]["f"] for name in METRICS[1:]}


@pytest.mark.parametrize(("prediction", "reference"), PAIRS)
def test_scores_are_those_of_the_libraries(prediction, reference):
    scores = score(prediction, reference)
    assert tuple(scores) == METRICS
    assert scores == pytest.approx(scores_of_libraries(prediction, reference), abs=1e-4)


def test_scores_of_adgen_rows_are_those_of_the_libraries(sample_rows):
    answers = [row["output"] for row in sample_rows[:20]]
    for prediction, reference in itertools.pairwise(answers):
        assert score(prediction, reference) == pytest.approx(scores_of_libraries(prediction, reference), abs=1e-4)


def test_equal_answer_scores_100_and_an_answer_without_common_words_0():
    assert score(PAIRS[1][0], PAIRS[1][1]) == pytest.approx(dict.fromkeys(METRICS, 100), abs=1e-3)
    assert score("完全不同", "简约大方百搭") == dict.fromkeys(METRICS, 0)


@pytest.mark.parametrize("prediction", ["", " ", "\n\t", "\u3000"])
def test_an_empty_answer_counts_as_zero(prediction):
    assert score(prediction, "简约的连衣裙") == dict.fromkeys(METRICS, 0)


def test_any_text_can_be_scored():
    draw = random.Random(0)
    characters = "裙的。！？…\n “”.?! a1\u200b\u3000\x85"
    for _ in range(300):
        prediction = "".join(draw.choices(characters, k=draw.randint(0, 8)))
        assert all(0 <= value <= 100.001 for value in score(prediction, "简约的连衣裙。显瘦！").values()), repr(
            prediction
        )


def test_the_mean_is_over_samples():
    one, other = (dict.fromkeys(METRICS, value) for value in (10.0, 20.0))
    assert mean_scores([one, other, other]) == pytest.approx(dict.fromkeys(METRICS, 50 / 3))


def test_missing_libraries_are_named_with_the_command(monkeypatch):
    check_metric_libraries()
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "rouge_chinese" else find_spec(name))
    with pytest.raises(ValueError, match="need rouge-chinese: run `pip install jieba rouge-chinese nltk`"):
        check_metric_libraries()
