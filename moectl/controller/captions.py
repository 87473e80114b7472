"""What captions are worth against those that people wrote: CIDEr-D, BLEU-4, ROUGE-L."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence

Gram = tuple[str, ...]

_ORDERS = 4  # n-grams have 1 to 4 words
_SIGMA = 6.0  # words by which two lengths may differ
_SCALE = 10.0
_BETA = 1.2  # recall counts more than precision

_WORD = re.compile(
    r"""
    n't\b | '(?:s|re|ve|ll|d|m)\b   # what the treebank splits from a word
    | \d+(?:[.,]\d+)+               # 3.5 and 1,000
    | \w+?(?=n't\b)                 # the "do" of "don't"
    | \w+(?:-\w+)*                  # t-shirt
    """,
    re.VERBOSE,
)


def tokenize(text: str) -> list[str]:
    """Split a caption into words, in lower case and without punctuation.

    `The man's red T-shirt isn't 3.5 years old.` becomes `the man 's red t-shirt is n't 3.5 years
    old`.

    Limit: near the Penn Treebank tokenizer of the COCO evaluation, not equal to it. Symbols such as
    `&` and `%` and the stops of `u.s.` go, and `cannot` stays one word, so that scores may differ
    in the third digit.
    """
    return _WORD.findall(text.lower().replace("’", "'"))


class Corpus:
    """Captions of many images, and in how many of the images each n-gram is found."""

    def __init__(self, references: Mapping[str, Sequence[str]]) -> None:
        """Count the n-grams.

        Args:
            references: captions of each image, by its name.

        Raises:
            ValueError: if an image has no caption, or if there is one image only: n-grams found in
                every image are worth nothing, so that every score would be 0.
        """
        if len(references) < 2:
            raise ValueError(f"captions of {len(references)} images: expected at least 2")
        images: Counter[Gram] = Counter()
        for name, captions in references.items():
            if not any(tokenize(caption) for caption in captions):
                raise ValueError(f"image {name} has no caption")
            images.update({gram for words in _worded(captions) for gram in _grams(words)})
        self._references = dict(references)
        self._log_size = math.log(len(references))
        # An n-gram of one image weighs as much as one of none; most are, and need not be kept.
        self._log_images = {gram: math.log(count) for gram, count in images.items() if count > 1}

    def cider(self, prediction: str, references: Sequence[str]) -> float:
        """Compare a caption with those of its image by CIDEr-D.

        The mean over references and over n = 1 to 4 of the cosine between counts weighted by rarity
        in the corpus; a count beyond that of the reference does not help, nor does another length.
        It is 10 for the only reference itself, if that has n-grams of every n that are not in all
        images, and 0 for a caption that shares no word with them.

        Args:
            prediction: a caption.
            references: captions of the image; they need not be in the corpus.

        Raises:
            ValueError: if there are no references.

        Source: Vedantam et al. 2015.
        """
        mine = tokenize(prediction)
        weights = self._weights(mine)
        total = 0.0
        worded = _worded(references)
        for words in worded:
            cosines = map(_clipped_cosine, weights, self._weights(words))
            length = math.exp(-((len(mine) - len(words)) ** 2) / (2 * _SIGMA**2))
            total += length * sum(cosines) / _ORDERS
        return _SCALE * total / len(worded)

    def reward(self, prediction: str, references: Sequence[str]) -> float:
        """CIDEr-D of one caption on the scale of an accuracy: from 0 to 1.

        Raises:
            ValueError: if there are no references.
        """
        return self.cider(prediction, references) / _SCALE

    def measure(self, predictions: Mapping[str, str]) -> dict[str, float]:
        """Measure captions of images of the corpus.

        Args:
            predictions: a caption of each image, by its name; the images may be some of the corpus.

        Returns:
            `cider_d` (0 to 10, the mean over images), `bleu4` and `rouge_l` (0 to 1).

        Raises:
            ValueError: if there are no captions, or one of an unknown image.
        """
        if not predictions:
            raise ValueError("no captions to measure")
        if strange := predictions.keys() - self._references.keys():
            raise ValueError(f"image {min(strange)} is not in the corpus")
        captions = list(predictions.values())
        references = [self._references[name] for name in predictions]
        scores = map(self.cider, captions, references)
        return {
            "cider_d": sum(scores) / len(captions),
            "bleu4": bleu4(captions, references),
            "rouge_l": rouge_l(captions, references),
        }

    def _weights(self, words: list[str]) -> list[dict[Gram, float]]:
        """For each n, counts of n-grams times the logarithm of how rare they are."""
        weights: list[dict[Gram, float]] = [{} for _ in range(_ORDERS)]
        for gram, count in _grams(words).items():
            rarity = self._log_size - self._log_images.get(gram, 0.0)
            weights[len(gram) - 1][gram] = count * rarity
        return weights


def bleu4(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Measure captions by the n-grams that they share with references: BLEU of n = 1 to 4.

    Counted over all captions, without smoothing; the length to reach is that of the nearest
    reference, the shorter of two.

    Args:
        predictions: captions.
        references: for each of them, captions of its image.

    Raises:
        ValueError: if a caption has no references.

    Source: Papineni et al. 2002.
    """
    shared, written = [0] * _ORDERS, [0] * _ORDERS
    length = wanted = 0
    for prediction, captions in zip(predictions, references, strict=True):
        words, worded = tokenize(prediction), _worded(captions)
        most: Counter[Gram] = Counter()
        for other in worded:
            most |= _grams(other)
        for gram, count in _grams(words).items():
            shared[len(gram) - 1] += min(count, most[gram])
            written[len(gram) - 1] += count
        length += len(words)
        wanted += min((abs(len(other) - len(words)), len(other)) for other in worded)[1]
    if not all(shared):
        return 0.0
    logs = [math.log(part / whole) for part, whole in zip(shared, written, strict=True)]
    return math.exp(sum(logs) / _ORDERS + min(0.0, 1 - wanted / length))


def rouge_l(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Measure captions by the longest sequence of words in common: mean ROUGE-L.

    Precision and recall of a caption are each the best over its references, weighed as the COCO
    evaluation does (beta 1.2).

    Args:
        predictions: captions, at least one.
        references: for each of them, captions of its image.

    Raises:
        ValueError: if a caption has no references.

    Source: Lin 2004.
    """
    pairs = zip(predictions, references, strict=True)
    scores = [_rouge(tokenize(prediction), _worded(captions)) for prediction, captions in pairs]
    return sum(scores) / len(scores)


def _rouge(words: list[str], references: list[list[str]]) -> float:
    common = [_common(words, other) for other in references]
    if not any(common):
        return 0.0
    precision = max(common) / len(words)
    recall = max(part / len(other) for part, other in zip(common, references, strict=True))
    return (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)


def _common(words: list[str], other: list[str]) -> int:
    """Length of the longest sequence of words, with gaps, that both have."""
    row = [0] * (len(other) + 1)
    for word in words:
        corner = 0
        for place, wanted in enumerate(other, start=1):
            longer = corner + 1 if word == wanted else max(row[place], row[place - 1])
            corner, row[place] = row[place], longer
    return row[-1]


def _worded(captions: Sequence[str]) -> list[list[str]]:
    """Words of the captions that have any."""
    worded = [words for words in map(tokenize, captions) if words]
    if isinstance(captions, str) or not worded:
        raise ValueError(f"references are {captions!r}: expected a list of captions")
    return worded


def _grams(words: list[str]) -> Counter[Gram]:
    sizes = range(1, _ORDERS + 1)
    return Counter(tuple(words[at : at + n]) for n in sizes for at in range(len(words) - n + 1))


def _clipped_cosine(mine: dict[Gram, float], theirs: dict[Gram, float]) -> float:
    norm = math.hypot(*mine.values()) * math.hypot(*theirs.values())
    if norm == 0:
        return 0.0
    pairs = ((weight, theirs.get(gram, 0.0)) for gram, weight in mine.items())
    return sum(min(weight, other) * other for weight, other in pairs) / norm
