import json
import os
import random
from collections import Counter
from pathlib import Path
from typing import get_args

import pytest

from moectl.controller.captions import Corpus
from moectl.controller.normalise import normalise
from moectl.controller.scores import (
    Metric,
    anls,
    clean,
    exact_match,
    score,
    vqa_official,
    vqa_soft,
)

CORPUS = {"1": ["a red cat sits on a mat"], "2": ["two dogs run over green grass"]}


def people(matches, count=10):
    """Answers of people, some of whom say `net`; the others all differ."""
    return ["net"] * matches + [f"other {number}x" for number in range(count - matches)]


def left_out(prediction, answers):
    """The official score, said slowly: everybody is left out once."""
    wanted = normalise(prediction)
    accuracies = []
    for absent in range(len(answers)):
        others = [normalise(answers[place]) for place in range(len(answers)) if place != absent]
        accuracies.append(min(1.0, others.count(wanted) / 3.0))
    return sum(accuracies) / len(accuracies)


def edit_distance(text, other):
    """The number of edits, said slowly."""
    if not text or not other:
        return len(text) + len(other)
    replaced = edit_distance(text[1:], other[1:]) + (text[0] != other[0])
    return min(replaced, 1 + edit_distance(text[1:], other), 1 + edit_distance(text, other[1:]))


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("net", "net"),
        ("  a   red\tnet \n\n", "a red net"),
        ("I see a man.\nHe holds a bat.\n \n", "He holds a bat."),
        ("Question: what? Answer: a net", "a net"),
        ("Answer: one\nAnswer: two\nthree", "two three"),
        ("The answer: net", "The answer: net"),
        ("thinking\nAnswer:", ""),
        (" \n\t\n", ""),
        ("", ""),
    ],
)
def test_the_answer_is_taken_out_of_the_text(text, answer):
    assert clean(text) == answer
    assert clean(answer) == answer


@pytest.mark.parametrize(
    ("matches", "soft", "official"),
    [
        (0, 0, 0),
        (1, 1 / 3, 0.3),
        (2, 2 / 3, 0.6),
        (3, 1, 0.9),
        (4, 1, 1),
        (5, 1, 1),
        (10, 1, 1),
    ],
)
def test_scores_of_ten_answers_are_the_published_ones(matches, soft, official):
    assert vqa_soft("net", people(matches)) == pytest.approx(soft)
    assert vqa_official("net", people(matches)) == pytest.approx(official)


@pytest.mark.parametrize("count", [2, 3, 5, 9, 10, 11])
def test_the_official_score_leaves_everybody_out_once(count):
    for matches in range(count + 1):
        answers = people(matches, count)
        assert vqa_official("net", answers) == pytest.approx(left_out("net", answers))


def test_prediction_and_answers_are_normalised():
    answers = ["2", "Two.", "two", "the 2"] + ["3"] * 6
    for prediction in ["two", "2", "a two!", "TWO"]:
        assert vqa_soft(prediction, answers) == 1
        assert vqa_official(prediction, answers) == 1
    assert vqa_soft("two dogs", answers) == 0


def test_equal_answers_are_normalised_like_others():
    assert vqa_soft("Two.", ["two"] * 10) == vqa_official("Two.", ["two"] * 10) == 1


def test_a_single_answer_stands_for_ten():
    assert vqa_soft("yes", ["Yes"]) == vqa_official("yes", ["Yes"]) == 1
    assert vqa_soft("no", ["yes"]) == vqa_official("no", ["yes"]) == 0


def test_the_order_of_the_answers_does_not_matter():
    answers = people(2)
    random.Random(1).shuffle(answers)
    assert vqa_official("net", answers) == pytest.approx(0.6)


@pytest.mark.parametrize("measure", [vqa_soft, vqa_official, exact_match, anls])
@pytest.mark.parametrize("answers", [[], ["", " "]])
def test_missing_answers_are_an_error(measure, answers):
    with pytest.raises(ValueError, match="without answers"):
        measure("net", answers)


@pytest.mark.parametrize("measure", [vqa_soft, vqa_official, exact_match, anls])
def test_a_text_is_no_list_of_answers(measure):
    with pytest.raises(ValueError, match=r"'net'.*list"):
        measure("n", "net")


def test_exact_match_ignores_case_and_blanks_only():
    assert exact_match("Red  Cat", ["dog", " red cat "]) == 1
    assert exact_match("red cat.", ["red cat"]) == 0
    assert exact_match("the", ["a"]) == 0
    assert exact_match("A", ["a"]) == 1


@pytest.mark.parametrize(
    ("prediction", "answers", "value"),
    [
        ("Dakota", ["dakota"], 1),
        ("dakoda", ["dakota"], 5 / 6),
        ("dakota digital", ["dakota", "dakota digitel"], 13 / 14),
        ("cat", ["dog"], 0),
        ("abcd", ["abxy"], 0.5),
        ("abc", ["xyc"], 0),
        ("", ["net"], 0),
        (" a  b ", ["A B"], 1),
    ],
)
def test_anls_is_the_share_of_letters_that_stay(prediction, answers, value):
    assert anls(prediction, answers) == pytest.approx(value)


def test_the_threshold_of_anls_cuts_what_is_below():
    assert anls("abc", ["xyc"], threshold=0.3) == pytest.approx(1 / 3)
    assert anls("dakoda", ["dakota"], threshold=0.9) == 0


def test_anls_counts_edits_like_the_slow_recursion():
    draw = random.Random(2)
    for _ in range(60):
        text = "".join(draw.choices("abc", k=draw.randint(0, 5)))
        other = "".join(draw.choices("abc", k=draw.randint(1, 5)))
        share = 1 - edit_distance(text, other) / max(len(text), len(other))
        assert anls(text, [other], threshold=0) == pytest.approx(share)


def test_each_metric_is_scored_by_its_name():
    answers = ["stone"] * 2 + ["ale"] * 8
    assert score("vqa", "stone", answers) == pytest.approx(2 / 3)
    assert score("exact", "Stone", answers) == 1
    assert score("exact", "stone.", answers) == 0
    assert score("anls", "stane", answers) == pytest.approx(0.8)
    caption = score("caption", CORPUS["1"][0], CORPUS["1"], Corpus(CORPUS))
    assert caption == pytest.approx(1)
    assert get_args(Metric) == ("vqa", "exact", "anls", "caption")


@pytest.mark.parametrize("metric", ["vqa", "exact", "anls"])
def test_what_is_scored_is_cleaned(metric):
    assert score(metric, "He plays.\nAnswer:  net\n", ["net"]) == 1


def test_captions_are_cleaned_too():
    written = "Answer: a red cat sits on a mat"
    assert score("caption", written, CORPUS["1"], Corpus(CORPUS)) == pytest.approx(1)


@pytest.mark.parametrize("metric", get_args(Metric))
def test_no_metric_scores_without_answers(metric):
    with pytest.raises(ValueError, match=r"without answers|expected a list of captions"):
        score(metric, "net", [], Corpus(CORPUS))


def test_captions_need_a_corpus():
    with pytest.raises(ValueError, match="corpus"):
        score("caption", "a cat", ["a cat"])


def test_an_unknown_metric_is_refused():
    with pytest.raises(ValueError, match="metric bleu"):
        score("bleu", "a cat", ["a cat"])


@pytest.fixture(scope="session")
def answered():
    """Folder with answers that people gave."""
    place = os.environ.get("MOECTL_TEST_DATA")
    if not place:
        pytest.skip("MOECTL_TEST_DATA names no folder with vqa/")
    folder = Path(place) / "vqa"
    names = ["textvqa_val_answers.jsonl", "vqav2_sample.jsonl"]
    if missing := [name for name in names if not (folder / name).is_file()]:
        pytest.skip(f"{folder / missing[0]} is missing")
    lines = [line for name in names for line in (folder / name).read_text("utf-8").splitlines()]
    return [json.loads(line) for line in lines]


def test_real_questions_are_scored_as_by_leaving_everybody_out(answered):
    assert len(answered) == 38
    for row in answered:
        answers = row["answers"]
        assert len(answers) == 10
        for prediction in [*answers, row.get("model_prediction", "no")]:
            expected = left_out(prediction, answers)
            assert vqa_official(prediction, answers) == pytest.approx(expected)
            assert vqa_official(prediction, answers) <= vqa_soft(prediction, answers) + 1e-12


def test_real_answers_score_by_how_often_they_were_given(answered):
    for row in answered:
        counts = Counter(map(normalise, row["answers"]))
        for answer, count in counts.items():
            assert vqa_soft(answer, row["answers"]) == pytest.approx(min(1, count / 3))


def test_real_predictions_get_the_scores_that_one_counts_by_hand(answered):
    rows = {row["question_id"]: row for row in answered}
    expected = {
        34602: 1.0,  # Dakota: 5 times
        34603: 1.0,  # COPENHAGEN
        34604: 0.3,  # stone: once
        34605: 1.0,  # BOWMORE.
        34606: 1.0,  # 10 years.
    }
    for question, value in expected.items():
        row = rows[question]
        assert vqa_official(row["model_prediction"], row["answers"]) == pytest.approx(value)
    assert vqa_official("mesh", rows[458752000]["answers"]) == pytest.approx(0.3)
    assert vqa_official("net", rows[458752000]["answers"]) == 1
