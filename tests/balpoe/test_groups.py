import json
import subprocess
import sys

import pytest

from moectl.balpoe.groups import Groups, class_groups
from moectl.engine.errors import UserError

COUNTS = [500, 101, 100, 20, 19, 5]
NAMES = ["apple", "bear", "cat", "dog", "eel", "fox"]


def groups(kind, counts=COUNTS, names=NAMES, **more):
    return class_groups(str(kind), counts, names, **more)


def refused(kind, counts=COUNTS, names=NAMES, **more) -> UserError:
    with pytest.raises(UserError) as caught:
        groups(kind, counts, names, **more)
    return caught.value


def test_the_tail_includes_its_threshold():
    assert groups("head_tail") == Groups(("head", "tail"), (0, 0, 0, 1, 1, 1))
    assert groups("head_tail", tail_threshold=19).of_class == (0, 0, 0, 0, 1, 1)
    assert groups("head_tail", tail_threshold=100).of_class == (0, 0, 1, 1, 1, 1)


def test_shots_are_many_medium_few():
    assert groups("shots") == Groups(("many", "medium", "few"), (0, 0, 1, 1, 2, 2))


def test_every_class_can_be_its_own_group():
    assert groups("class") == Groups(tuple(NAMES), (0, 1, 2, 3, 4, 5))


def test_classes_of_one_name_are_told_apart():
    names = ["crane", "owl", "crane"]
    assert groups("class", [3, 2, 1], names).names == ("crane (0)", "owl", "crane (2)")


@pytest.mark.parametrize(
    ("kind", "counts", "expected"),
    [
        ("quantile:0.5", COUNTS, (0, 0, 0, 1, 1, 1)),
        ("quantile:0.5", COUNTS[::-1], (1, 1, 1, 0, 0, 0)),
        ("quantile:0.3", [7] * 6, (0, 0, 0, 0, 1, 1)),
        ("quantile:0.3", [5, 9, 5, 9, 5, 9], (0, 0, 1, 0, 1, 0)),
        ("quantile:0.001", COUNTS, (0, 0, 0, 0, 0, 1)),
        ("quantile:0.999", COUNTS, (0, 1, 1, 1, 1, 1)),
    ],
)
def test_a_quantile_takes_the_rarest_and_of_equals_the_later(kind, counts, expected):
    assert groups(kind, counts) == Groups(("head", "tail"), expected)


@pytest.mark.parametrize("share", ["0", "1", "-0.3", "nan", "inf", "third", ""])
def test_a_share_that_is_none_is_refused(share):
    assert f"plugin.groups is quantile:{share}, expected" in refused(f"quantile:{share}").message


def test_a_single_class_has_no_quantile():
    assert "single class" in refused("quantile:0.5", [9], ["apple"]).message


def test_a_file_names_classes_by_name_or_index(tmp_path):
    table = {"rare": ["fox", 4], "common": [0, "bear", 2, "dog"]}
    expected = Groups(("rare", "common"), (1, 1, 1, 1, 0, 0))
    path = tmp_path / "groups.json"
    path.write_text(json.dumps(table))
    assert groups(path) == expected
    path = tmp_path / "groups.TOML"
    path.write_text('rare = ["fox", 4]\ncommon = [0, "bear", 2, "dog"]\n')
    assert groups(path) == expected


def test_a_name_made_of_digits_is_a_name(tmp_path):
    path = tmp_path / "groups.json"
    path.write_text('{"a": ["0"], "b": ["1"]}')
    assert groups(path, [1, 2], ["1", "0"]).of_class == (1, 0)


@pytest.mark.parametrize(
    ("counts", "threshold", "message", "hint"),
    [
        (
            [500, 50],
            20,
            "plugin.groups is head_tail, but no class has 20 training images or fewer,"
            " so the group tail is empty",
            "raise plugin.tail_threshold, or set plugin.groups to shots, class or quantile:0.3",
        ),
        (
            [5, 9],
            10,
            "plugin.groups is head_tail, but every class has 10 training images or fewer,"
            " so the group head is empty",
            "lower plugin.tail_threshold, or set plugin.groups to shots, class or quantile:0.3",
        ),
    ],
)
def test_an_empty_head_or_tail_is_named_with_the_way_out(counts, threshold, message, hint):
    error = refused("head_tail", counts, ["apple", "bear"], tail_threshold=threshold)
    assert (error.message, error.hint) == (message, hint)


def test_empty_shots_are_named_with_their_rules():
    one = refused("shots", [500, 50], ["apple", "bear"])
    assert one.message == (
        "plugin.groups is shots, but no class has fewer than 20 (few), so the group few is empty"
    )
    two = refused("shots", [50, 50], ["apple", "bear"]).message
    assert "more than 100 training images (many) or fewer than 20 (few)" in two
    assert two.endswith("so many and few are empty")
    assert "head_tail, class or quantile:0.3" in one.hint


def test_an_unknown_kind_lists_the_kinds():
    message = refused("head-tail").message
    for kind in ("plugin.groups is head-tail", "shots", "class", "quantile:Q", ".json or .toml"):
        assert kind in message
    assert message.endswith("did you mean head_tail?")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": [', "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[0, 1]", "expected a table of groups"),
        ('{"a": "apple"}', "a is 'apple', expected a list"),
        ('{"a": [0, 1, 2, 3, 4, 5], "b": []}', "the group b is empty"),
        ('{"a": ["apple", "bare"]}', "a: no class is named bare; did you mean bear?"),
        ('{"a": [6]}', "a: 6 is neither a class name nor an index from 0 to 5"),
        ('{"a": [-1]}', "a: -1 is neither"),
        ('{"a": [true]}', "a: True is neither"),
        ('{"a": [1.0]}', "a: 1.0 is neither"),
        ('{"a": ["apple"], "b": [0]}', "class apple is in a and b"),
        ('{"a": ["apple", 0]}', "class apple is in a twice"),
        ('{"a": [0, 1], "b": [2, 3]}', "2 of 6 classes are in no group (eel, fox)"),
        ("{}", "6 of 6 classes are in no group (apple, bear, cat, dog, eel …)"),
    ],
)
def test_a_wrong_file_is_refused_in_one_sentence(tmp_path, text, message):
    path = tmp_path / "groups.json"
    path.write_text(text)
    error = refused(path)
    assert error.message.startswith(f"{path}: ")
    assert message in error.message
    assert "\n" not in error.message


def test_a_file_that_is_no_text_or_no_toml_or_not_there_is_named(tmp_path):
    (tmp_path / "a.json").write_bytes(b'{"a": ["\xff"]}')
    assert "a.json: not UTF-8 text" in refused(tmp_path / "a.json").message
    (tmp_path / "a.toml").write_text("a = [")
    assert "a.toml: not valid TOML" in refused(tmp_path / "a.toml").message
    for name in ("b.json", "b.toml"):
        assert f"{name}: cannot be read (No such file" in refused(tmp_path / name).message


def test_a_name_of_two_classes_asks_for_indices(tmp_path):
    path = tmp_path / "groups.json"
    path.write_text('{"a": ["crane"], "b": [1]}')
    message = refused(path, [1, 2], ["crane", "crane"]).message
    assert "2 classes are named crane, give their indices" in message


def test_groups_without_shots_need_no_torch():
    code = (
        "import sys; from moectl.balpoe.groups import class_groups;"
        "class_groups('head_tail', [50, 5], 'ab'); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
