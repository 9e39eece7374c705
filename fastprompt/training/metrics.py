"""Scores of predictions: shares between 0 and 1 (BLEU: 0 to 100), the higher the better.

seqeval, scikit-learn (which it brings) and sacrebleu compute what they can; they are imported when first used.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np

from fastprompt.training import packages

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def accuracy(predicted: Sequence[int], wanted: Sequence[int]) -> dict[str, float]:
    """Share of right ones."""
    return {"accuracy": float((np.asarray(predicted) == np.asarray(wanted)).mean())}


def classification(predicted: Sequence[int], wanted: Sequence[int], classes: int) -> dict[str, float]:
    """Accuracy, macro F1 and Matthews correlation of class indices; with two classes also F1 of class 1."""
    from sklearn.metrics import f1_score, matthews_corrcoef

    guess, truth = np.asarray(predicted), np.asarray(wanted)
    constant = min(len(set(predicted)), len(set(wanted))) < 2
    scores = accuracy(predicted, wanted) | {
        "f1_macro": float(f1_score(truth, guess, average="macro", zero_division=0)),
        "mcc": 0.0 if constant else float(matthews_corrcoef(truth, guess)),
    }
    if classes == 2:
        scores["f1"] = float(f1_score(truth, guess, zero_division=0))
    return scores


def entities(predicted: Sequence[Sequence[str]], wanted: Sequence[Sequence[str]]) -> dict[str, float]:
    """seqeval's precision, recall and F1 of entities in BIO tags, and the share of right tags.

    As in the CoNLL evaluation: an entity counts if its type and both its ends are right.
    """
    from seqeval.metrics import accuracy_score, f1_score, precision_score, recall_score

    truth, guess = [list(tags) for tags in wanted], [list(tags) for tags in predicted]
    return {
        "f1": float(f1_score(truth, guess, zero_division=0)),
        "precision": float(precision_score(truth, guess, zero_division=0)),
        "recall": float(recall_score(truth, guess, zero_division=0)),
        "accuracy": float(accuracy_score(truth, guess)),
    }


def ranking(ranks: Sequence[int]) -> dict[str, float]:
    """Precision at 1 and 10 and mean reciprocal rank, of ranks that start at 1."""
    places = np.asarray(ranks, dtype=np.float64)
    return {
        "p_at_1": float((places <= 1).mean()),
        "p_at_10": float((places <= 10).mean()),
        "mrr": float((1 / places).mean()),
    }


def answers(predicted: Sequence[str], wanted: Sequence[Sequence[str]]) -> dict[str, float]:
    """SQuAD's exact match and F1: the best over each question's right answers, none of which means "no answer"."""
    pairs = [
        (guess, [a for a in right if plain_answer(a)] or [""]) for guess, right in zip(predicted, wanted, strict=True)
    ]
    exact = [max(plain_answer(guess) == plain_answer(answer) for answer in right) for guess, right in pairs]
    overlap = [max(word_f1(guess, answer) for answer in right) for guess, right in pairs]
    return {"exact_match": float(np.mean(exact)), "f1": float(np.mean(overlap))}


def plain_answer(text: str) -> str:
    """An answer as SQuAD compares it: small letters, without punctuation, articles and surplus spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def word_f1(guess: str, answer: str) -> float:
    """F1 of the words that two answers share; two empty ones agree."""
    first, second = plain_answer(guess).split(), plain_answer(answer).split()
    if not first or not second:
        return float(first == second)
    common = (Counter(first) & Counter(second)).total()
    return 2 * common / (len(first) + len(second))


def generation(predicted: Sequence[str], wanted: Sequence[str], *, bleu: bool) -> dict[str, float]:
    """Share of texts that are right but for space around them; with `bleu` also sacrebleu's corpus BLEU, 0 to 100."""
    same = [guess.strip() == text.strip() for guess, text in zip(predicted, wanted, strict=True)]
    scores = {"exact_match": float(np.mean(same))}
    if bleu:
        packages.need("bleu=True", "sacrebleu")
        import sacrebleu

        scores["bleu"] = float(sacrebleu.corpus_bleu(list(predicted), [list(wanted)]).score)
    return scores
