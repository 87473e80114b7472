"""What one answer is worth against the answers that people gave."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from moectl.controller.normalise import normalise

if TYPE_CHECKING:
    from moectl.controller.captions import Corpus

Metric = Literal["vqa", "exact", "anls", "caption"]

_MARKER = "Answer:"
_PEOPLE = 10  # answers of a VQA question
_ENOUGH = 3  # of them that make an answer right


def score(
    metric: Metric, prediction: str, answers: Sequence[str], corpus: "Corpus | None" = None
) -> float:
    """Score what a network wrote.

    Args:
        metric: `vqa` is `vqa_soft`, `caption` the reward of a corpus.
        prediction: the text as it was generated; `clean` is done here.
        answers: of people, at least one; captions likewise.
        corpus: where captions have their frequencies from; nothing else needs it.

    Returns:
        From 0 to 1.

    Raises:
        ValueError: if there are no answers, or no corpus for captions.
    """
    prediction = clean(prediction)
    match metric:
        case "vqa":
            return vqa_soft(prediction, answers)
        case "exact":
            return exact_match(prediction, answers)
        case "anls":
            return anls(prediction, answers)
        case "caption" if corpus is None:
            raise ValueError("captions are scored against a corpus, and none was given")
        case "caption":
            return corpus.reward(prediction, answers)
        case _:
            raise ValueError(f"metric {metric}: expected vqa, exact, anls or caption")


def clean(text: str) -> str:
    """Take the answer out of what a network wrote.

    Returns:
        What follows the last `Answer:`, or else the last line that is not blank; one line, with
        one blank between words. Cleaning it again changes nothing.
    """
    _, marker, tail = text.rpartition(_MARKER)
    if marker:
        return _joined(tail)
    lines = [line for line in text.splitlines() if line.strip()]
    return _joined(lines[-1]) if lines else ""


def vqa_soft(prediction: str, answers: Sequence[str]) -> float:
    """Score an answer by how many people gave it: `min(matches / 3, 1)`.

    Prediction and answers are always normalised. The published code leaves both as they are when
    all ten answers are equal, so that `Two` is wrong there if everybody wrote `two`; the published
    description knows no such exception, and neither does this.

    Args:
        prediction: one line.
        answers: of ten people; a single one stands for ten equal ones.

    Raises:
        ValueError: if there are no answers.

    Source: Antol et al. 2015.
    """
    matches, _ = _matches(prediction, answers)
    return min(matches / _ENOUGH, 1.0)


def vqa_official(prediction: str, answers: Sequence[str]) -> float:
    """Score an answer against each nine of ten people, and take the mean.

    It is 0.3, 0.6, 0.9 for 1, 2, 3 matches of ten and 1 for more. Normalised as in `vqa_soft`.

    Args:
        prediction: one line.
        answers: of ten people; a single one stands for ten equal ones.

    Raises:
        ValueError: if there are no answers.

    Source: Antol et al. 2015, the published evaluation code.
    """
    matches, people = _matches(prediction, answers)
    without_match = min((matches - 1) / _ENOUGH, 1.0)
    without_other = min(matches / _ENOUGH, 1.0)
    return (matches * without_match + (people - matches) * without_other) / people


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 if the prediction is one of the answers, apart from case and blanks; 0 otherwise.

    Marks and articles count: `A` is a choice here, and no article.

    Raises:
        ValueError: if there are no answers.
    """
    folded = _joined(prediction).lower()
    return float(any(folded == _joined(answer).lower() for answer in _given(answers)))


def anls(prediction: str, answers: Sequence[str], threshold: float = 0.5) -> float:
    """Score an answer by how few letters have to change to make it the nearest right one.

    One minus edits per letter of the longer text, apart from case and blanks. Less than the
    threshold is 0. At the threshold itself the score stands, as in the published evaluations.

    Raises:
        ValueError: if there are no answers.

    Source: Biten et al. 2019.
    """
    folded = _joined(prediction).lower()
    best = max(_similarity(folded, _joined(answer).lower()) for answer in _given(answers))
    return best if best >= threshold else 0.0


def _matches(prediction: str, answers: Sequence[str]) -> tuple[int, int]:
    """How many people gave the prediction, and how many there are."""
    given = _given(answers)
    if len(given) == 1:
        given = given * _PEOPLE
    normal = normalise(prediction)
    return sum(normalise(answer) == normal for answer in given), len(given)


def _given(answers: Sequence[str]) -> list[str]:
    if isinstance(answers, str):  # a text is a sequence of texts, too: of its letters
        raise ValueError(f"answers are the text {answers!r}: expected a list of texts")
    if not any(answer.strip() for answer in answers):
        raise ValueError("a question without answers cannot be scored")
    return list(answers)


def _joined(text: str) -> str:
    return " ".join(text.split())


def _similarity(text: str, other: str) -> float:
    longer = max(len(text), len(other))
    return 1.0 - _edits(text, other) / longer if longer else 1.0


def _edits(text: str, other: str) -> int:
    """Letters to insert, delete or replace that turn one text into the other."""
    row = list(range(len(other) + 1))
    for deleted, letter in enumerate(text, start=1):
        corner, row[0] = row[0], deleted
        for place, wanted in enumerate(other, start=1):
            replaced = corner + (letter != wanted)
            corner = row[place]
            row[place] = min(replaced, row[place] + 1, row[place - 1] + 1)
    return row[-1]
