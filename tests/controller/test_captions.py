import itertools
import math
import random

import numpy as np
import pytest

from moectl.controller.captions import Corpus, bleu4, rouge_l, tokenize

WORDS = ["a", "red", "blue", "cat", "dog", "sits", "runs", "on", "under", "the", "mat", "tree"]
THREE = {"1": ["red cat"], "2": ["red dog"], "3": ["blue bird"]}
LONG = {
    "1": ["a red cat sits on a mat", "a cat rests on the rug"],
    "2": ["two dogs run over green grass"],
    "3": ["people wait for their bus downtown"],
}


def drawn(seed, images=6, captions=3):
    draw = random.Random(seed)

    def caption():
        return " ".join(draw.choices(WORDS, k=draw.randint(1, 9)))

    references = {str(image): [caption() for _ in range(captions)] for image in range(images)}
    return references, {image: caption() for image in references}


def windows(caption, n):
    words = caption.split()
    return [" ".join(words[at : at + n]) for at in range(len(words) - n + 1)]


def slow_cider(prediction, captions, references):
    """CIDEr-D with a dense vector for every caption."""
    total = 0.0
    for caption, n in itertools.product(captions, [1, 2, 3, 4]):
        everything = [prediction, *itertools.chain(*references.values())]
        grams = sorted({gram for text in everything for gram in windows(text, n)})
        if not grams:
            continue
        images = [
            max(1, sum(any(g in windows(c, n) for c in refs) for refs in references.values()))
            for g in grams
        ]
        rarity = np.log(len(references) / np.array(images))
        mine = rarity * [windows(prediction, n).count(gram) for gram in grams]
        theirs = rarity * [windows(caption, n).count(gram) for gram in grams]
        norm = np.linalg.norm(mine) * np.linalg.norm(theirs)
        if norm > 0:
            gap = len(prediction.split()) - len(caption.split())
            total += np.minimum(mine, theirs) @ theirs / norm * math.exp(-(gap**2) / 72)
    return 10 * total / 4 / len(captions)


def slow_bleu(predictions, references):
    """BLEU-4, one n after the other."""
    product = 1.0
    for n in [1, 2, 3, 4]:
        found = written = 0
        for prediction, captions in zip(predictions, references, strict=True):
            mine = windows(prediction, n)
            written += len(mine)
            for gram in set(mine):
                most = max(windows(caption, n).count(gram) for caption in captions)
                found += min(mine.count(gram), most)
        product *= found / written
    lengths = [len(prediction.split()) for prediction in predictions]
    nearest = [
        min((len(caption.split()) for caption in captions), key=lambda k: (abs(k - length), k))
        for length, captions in zip(lengths, references, strict=True)
    ]
    return product**0.25 * min(1.0, math.exp(1 - sum(nearest) / sum(lengths)))


def slow_common(words, other):
    """Length of the longest common subsequence, by trying all."""
    for size in range(min(len(words), len(other)), 0, -1):
        if set(itertools.combinations(words, size)) & set(itertools.combinations(other, size)):
            return size
    return 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A cat.", ["a", "cat"]),
        ("Don't stop!", ["do", "n't", "stop"]),
        ("The man's dogs' toys", ["the", "man", "'s", "dogs", "toys"]),
        ("we’ll see, they've", ["we", "'ll", "see", "they", "'ve"]),
        ("a T-shirt -- red", ["a", "t-shirt", "red"]),
        ("3.5 of 1,000 (two)", ["3.5", "of", "1,000", "two"]),
        ("cat,dog 'dog'", ["cat", "dog", "dog"]),
        ("isn't it? won't", ["is", "n't", "it", "wo", "n't"]),
        ("un café", ["un", "café"]),
        (" ... ", []),
    ],
)
def test_captions_are_split_into_words(text, words):
    assert tokenize(text) == words


def test_cider_is_what_one_computes_by_hand():
    # "red" is in 2 of 3 images, all else in 1: r = ln 3 - ln 2, t = ln 3.
    r, t = 0.4054651081, 1.0986122887
    # One word too many, and "cat" twice: clipped to one in the product, not in the norm.
    single = (r * r + t * t) / math.sqrt(r * r + 4 * t * t) / math.sqrt(r * r + t * t)
    double = t * t / (math.sqrt(2) * t * t)
    expected = 10 * (single + double + 0 + 0) / 4 * math.exp(-1 / 72)
    assert Corpus(THREE).cider("red cat cat", ["red cat"]) == pytest.approx(expected)
    assert expected == pytest.approx(3.0356, abs=5e-5)


def test_words_of_every_image_are_worth_nothing():
    corpus = Corpus({"1": ["the cat"], "2": ["the dog"]})
    assert corpus.cider("the", ["the cat"]) == 0
    assert corpus.cider("the the cat", ["the cat"]) < corpus.cider("the cat", ["the cat"])


def test_images_are_counted_and_not_captions():
    once = Corpus({"1": ["red cat"], "2": ["red dog"], "3": ["blue bird"]})
    often = Corpus({"1": ["red cat"] * 4, "2": ["red dog"], "3": ["blue bird"]})
    assert often.cider("red cat cat", ["red cat"]) == once.cider("red cat cat", ["red cat"])


@pytest.mark.parametrize("seed", range(4))
def test_cider_agrees_with_dense_vectors(seed):
    references, predictions = drawn(seed)
    corpus = Corpus(references)
    for image, prediction in predictions.items():
        expected = slow_cider(prediction, references[image], references)
        assert corpus.cider(prediction, references[image]) == pytest.approx(expected)
        assert 0 <= corpus.reward(prediction, references[image]) <= 1


def test_the_only_reference_itself_gets_ten():
    corpus = Corpus(LONG)
    for captions in LONG.values():
        for caption in captions:
            assert corpus.cider(caption, [caption]) == pytest.approx(10)
            assert corpus.reward(caption.upper() + "!", [caption]) == pytest.approx(1)


def test_captions_without_a_common_word_get_nothing():
    assert Corpus(LONG).cider("white plane lands", LONG["1"]) == 0
    assert Corpus(LONG).reward("", LONG["1"]) == 0


def test_the_order_of_references_does_not_matter_and_blank_ones_do_not_count():
    corpus = Corpus(LONG)
    value = corpus.cider("a red cat on a rug", LONG["1"])
    assert corpus.cider("a red cat on a rug", [*reversed(LONG["1"]), " ."]) == pytest.approx(value)


def test_a_corpus_measures_the_mean_of_its_captions():
    references, predictions = drawn(7)
    corpus = Corpus(references)
    scores = [corpus.cider(text, references[image]) for image, text in predictions.items()]
    measured = corpus.measure(predictions)
    assert list(measured) == ["cider_d", "bleu4", "rouge_l"]
    assert measured["cider_d"] == pytest.approx(np.mean(scores))
    texts, captions = list(predictions.values()), list(references.values())
    assert measured["bleu4"] == bleu4(texts, captions)
    assert measured["rouge_l"] == rouge_l(texts, captions)


def test_a_corpus_measures_some_of_its_images_in_any_order():
    corpus = Corpus(LONG)
    perfect = {image: LONG[image][0] for image in ["3", "2"]}
    assert corpus.measure(perfect) == pytest.approx({"cider_d": 10, "bleu4": 1, "rouge_l": 1})


@pytest.mark.parametrize(
    ("references", "message"),
    [
        ({}, "0 images"),
        ({"1": ["a cat"]}, "1 images: expected at least 2"),
        ({"1": ["a cat"], "2": []}, "image 2 has no caption"),
        ({"1": ["a cat"], "2": [" "]}, "image 2 has no caption"),
        ({"1": ["a cat"], "2": "a dog"}, "'a dog': expected a list"),
    ],
)
def test_a_corpus_without_captions_is_refused(references, message):
    with pytest.raises(ValueError, match=message):
        Corpus(references)


def test_captions_that_cannot_be_measured_are_refused():
    corpus = Corpus(LONG)
    with pytest.raises(ValueError, match="no captions"):
        corpus.measure({})
    with pytest.raises(ValueError, match="image 9 is not"):
        corpus.measure({"1": "a cat", "9": "a dog"})
    with pytest.raises(ValueError, match="expected a list"):
        corpus.cider("a cat", [])


def test_bleu_is_what_one_computes_by_hand():
    # 6 words; 5 of 6, 3 of 5, 1 of 4 are right and no four: nothing without smoothing.
    assert bleu4(["a cat sat on the mat"], [["a cat lay on the mat"]]) == 0
    # 1-grams 6/7, 2-grams 4/6, 3-grams 2/5, 4-grams 1/4; the nearest length is 7.
    value = bleu4(["the cat sat on a red mat"], [["the cat sat on the red mat", "it sat"]])
    assert value == pytest.approx((6 / 7 * 4 / 6 * 2 / 5 * 1 / 4) ** 0.25)


def test_bleu_counts_a_word_as_often_as_one_reference_has_it():
    value = bleu4(["a a a b c d"], [["a a b c d e", "a b c d"]])
    assert value == pytest.approx((5 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** 0.25)


def test_bleu_punishes_captions_that_are_too_short_in_all():
    assert bleu4(["a b c d"], [["a b c d e f"]]) == pytest.approx(math.exp(1 - 6 / 4))
    assert bleu4(["a b c d e"], [["a b c d", "a b c d e f"]]) == pytest.approx(1)  # 4, not 6
    pooled = bleu4(["a b c d", "a b c d e f"], [["a b c d e f"], ["a b c d e f"]])
    assert pooled == pytest.approx(math.exp(1 - 12 / 10))


@pytest.mark.parametrize("seed", range(3))
def test_bleu_agrees_with_the_slow_count(seed):
    references, predictions = drawn(seed, images=30, captions=4)
    texts, captions = list(predictions.values()), list(references.values())
    # Most of a reference, so that four words in a row are found.
    texts[::2] = [" ".join(several[0].split()[:7]) for several in captions[::2]]
    expected = slow_bleu(texts, captions)
    assert 0.1 < expected < 0.9
    assert bleu4(texts, captions) == pytest.approx(expected)


def test_rouge_is_what_one_computes_by_hand():
    # In common: cat on mat; precision 3/4, recall 3/5.
    value = rouge_l(["cat is on mat"], [["one cat lies on mat"]])
    assert value == pytest.approx(2.44 * 0.75 * 0.6 / (0.6 + 1.44 * 0.75))
    # The best precision and the best recall may be of two references.
    value = rouge_l(["a b c d"], [["a b c x y z", "d"]])
    assert value == pytest.approx(2.44 * 0.75 * 1.0 / (1.0 + 1.44 * 0.75))


def test_rouge_is_a_mean_over_captions():
    assert rouge_l(["a b", "x", "?"], [["a b"], ["y"], ["z"]]) == pytest.approx(1 / 3)


def test_rouge_finds_the_longest_common_sequence():
    references, predictions = drawn(5, images=12, captions=1)
    for image, text in predictions.items():
        words, other = text.split(), references[image][0].split()
        common = slow_common(words, other)
        precision, recall = common / len(words), common / len(other)
        expected = 2.44 * precision * recall / (recall + 1.44 * precision) if common else 0
        assert rouge_l([text], [references[image]]) == pytest.approx(expected)


def test_captions_and_references_go_together():
    for measure in (bleu4, rouge_l):
        with pytest.raises(ValueError, match="argument"):
            measure(["a cat"], [])
        with pytest.raises(ValueError, match="expected a list"):
            measure(["a cat"], [[]])
