"""BLEU-4 and ROUGE of answers, computed as for the published scores of ChatGLM-6B on ADGEN.

ROUGE compares the words that jieba finds. BLEU-4 compares characters, with smoothing for short texts. Scores are in
percent; the score of a data set is the mean over its samples.
"""

import importlib.util
import logging
from collections.abc import Iterable
from statistics import fmean

METRICS = ("bleu-4", "rouge-1", "rouge-2", "rouge-l")
LIBRARIES = {"jieba": "jieba", "rouge_chinese": "rouge-chinese", "nltk": "nltk"}


def check_metric_libraries():
    """ValueError unless the libraries that compute the metrics are installed; training does not need them."""
    missing = [package for module, package in LIBRARIES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ValueError(f"the metrics need {', '.join(missing)}: run `pip install {' '.join(LIBRARIES.values())}`.")


def score(prediction: str, reference: str) -> dict[str, float]:
    """The scores of one answer; a blank answer scores 0.

    Args:
        prediction, reference: texts, both as the tokenizer decodes them: it converts much full-width punctuation to
            half-width.
    Returns:
        Name in `METRICS` -> percent, rounded to four decimal places.
    Source: compute_metrics in ptuning/main.py of ChatGLM-6B.
    """
    import jieba
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
    from rouge_chinese import Rouge

    jieba.setLogLevel(logging.WARNING)
    if not prediction.strip():
        return dict.fromkeys(METRICS, 0.0)
    words, reference_words = (" ".join(jieba.cut(text)) for text in (prediction, reference))
    rouge = Rouge().get_scores(words, reference_words)[0]
    bleu = sentence_bleu([list(reference)], list(prediction), smoothing_function=SmoothingFunction().method3)
    fractions = {"bleu-4": bleu} | {name: value["f"] for name, value in rouge.items()}
    return {name: round(100 * fractions[name], 4) for name in METRICS}


def mean_scores(scores: Iterable[dict[str, float]]) -> dict[str, float]:
    """The mean of each metric over samples."""
    scores = list(scores)
    return {name: fmean(sample[name] for sample in scores) for name in METRICS}
