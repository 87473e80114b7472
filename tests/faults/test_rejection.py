"""Bad input of `plugin` and `reject`: exit code 2, one sentence, nothing left behind."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moectl.balpoe.fitted import FILE

ITEMS, CLASSES = 240, 6
LABELS = np.arange(ITEMS) % CLASSES
LOGITS = np.random.default_rng(0).normal(size=(ITEMS, 3, CLASSES)).astype(np.float32)
LOGITS += 2 * np.eye(CLASSES, dtype=np.float32)[LABELS][:, None]
HELD: dict[str, Any] = {
    "logits": LOGITS, "labels": LABELS, "taus": [0.0, 1.0, 2.0],
    "class_counts": [400, 200, 110, 60, 15, 8],
}  # fmt: skip
DIVIDED: dict[str, Any] = {
    "logits": None, "labels": None, "val_logits": LOGITS[:120], "val_labels": LABELS[:120],
    "test_logits": LOGITS[120:], "test_labels": LABELS[120:],
}  # fmt: skip

Outcome = tuple[int, str, str]
Call = Callable[..., Outcome]


@pytest.fixture
def moectl(balpoe: Call) -> Call:
    return lambda *words: balpoe(*words, "--quiet")


def save(path: str, **changes: Any) -> str:
    """Write logits of all items; None leaves an array out."""
    arrays = {name: value for name, value in {**HELD, **changes}.items() if value is not None}
    np.savez(path, **arrays)
    return path


def refused(outcome: Outcome) -> str:
    """Return the one sentence of a refusal."""
    code, out, err = outcome
    assert (code, out) == (2, ""), err
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if not line.startswith("warning: ")]
    assert lines[0].startswith("error: ")
    assert all(line.startswith("hint: ") for line in lines[1:])
    return lines[0]


def at(row: int, value: Any, array: np.ndarray = LABELS) -> np.ndarray:
    """Change one item."""
    changed = array.copy()
    changed[row] = value
    return changed


POSTERIORS = np.full((ITEMS, 3, CLASSES), 1 / CLASSES)
BOTH = {"val_indices": np.arange(120), "test_indices": np.arange(119, 239)}
CIFAR10 = [5000, 2997, 1796, 1077, 645, 387]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"class_counts": CIFAR10}, "no class has 20 training images or fewer, so the group tail"),
        (DIVIDED | {"val_labels": LABELS[:120] % 4}, "group tail has no item to fit on"),
        (
            {"logits": None, "posteriors": at(7, 0.25, POSTERIORS)},
            "row 7 of expert 0 sums to 1.5, expected probabilities with sum 1",
        ),
        ({"logits": at(3, np.nan, LOGITS)}, "logits: row 3 is not finite"),
        ({"labels": at(9, 6)}, "row 9 is 6, expected a whole number from 0 to 5"),
        ({"labels": at(9, -1)}, "row 9 is -1"),
        ({"labels": LABELS[1:]}, "labels has 239 entries for 240 items"),
        ({"taus": None}, "taus is missing, which 3 experts need"),
        ({"class_counts": None}, "class_counts is missing"),
        (DIVIDED | BOTH, "1 items are both validation and test"),
        (
            {"logits": np.zeros((ITEMS, 17, CLASSES)), "taus": [1.0] * 17},
            "17 experts are too many",
        ),
    ],
)
def test_what_cannot_be_fitted_leaves_nothing(
    moectl: Call, isolated: Path, arrays: Mapping[str, Any], message: str
) -> None:
    path = save("held.npz", **arrays)
    assert message in refused(moectl("plugin", "--logits", path, "--out", "new"))
    assert [entry.name for entry in isolated.iterdir()] == [path]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--tail-threshold 900", "the group head is empty"),
        ("--groups class --rates 0.99", "has no accepted item at rejection rate 0.99"),
        ("--costs 1.5", "--costs = '1.5'"),
        ("--costs=-0.1", "--costs = '-0.1'"),
        ("--rates 0.1;1", "--rates = '1'"),
        ("--rates nan", "--rates = 'nan'"),
        ("--rates half", "--rates = 'half'"),
        ("--rates=", "plugin.rates and plugin.costs are both empty"),
        ("--groups heads", "plugin.groups is heads, expected head_tail"),
        ("--groups quantile:3", "plugin.groups is quantile:3"),
        ("--groups none.json", "none.json: cannot be read"),
        ("--label-prior unifrom", "did you mean uniform?"),
        ("--posterior single:3", "experts are 0 to 2"),
        ("--posterior product", "--posterior = 'product'"),
        ("--expert-weights 1;2", "expert_weights has 2 numbers for 3 experts"),
        ("--expert-weights gird", "plugin.expert_weights is 'gird', expected equal or grid"),
        ("--objective 1;2;3", "group weights must be 2 positive numbers"),
        ("--objective 1;0", "group weights must be 2 positive numbers"),
        ("--objective worse", "plugin.objective is 'worse', expected balanced or worst"),
        ("--mu-method newton", "'newton' is not one of"),
        ("--mu-method grid --groups class", "a grid over 6 groups"),
        ("--name a/b", "is not a usable name"),
        ("--config x.json", "--config is not an option of moectl balpoe plugin"),
        ("--checkpoint best", "use --run REF@last"),
    ],
)
def test_options_that_make_no_sense_leave_nothing(
    moectl: Call, isolated: Path, words: str, message: str
) -> None:
    outcome = moectl("plugin", "--logits", save("held.npz"), "--out", "new", *words.split())
    assert message in refused(outcome)
    assert [entry.name for entry in isolated.iterdir()] == ["held.npz"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--logits none.npz", "none.npz: cannot be read"),
        ("--logits .", ".: expected a .npz or .safetensors file"),
        ("--logits text.npz", "text.npz: not readable"),
        ("--run none", "none: no such run"),
        ("", "no finished run of balpoe"),
    ],
)
@pytest.mark.parametrize("command", ["plugin", "reject"])
def test_missing_input_is_named(moectl: Call, command: str, words: str, message: str) -> None:
    Path("text.npz").write_text("no archive")
    if command == "reject" and "--logits" in words:
        moectl("plugin", "--logits", save("held.npz"), "--rates", "0.2")
    assert message in refused(moectl(command, *words.split()))


@pytest.fixture
def theirs(moectl: Call) -> Path:
    """A run of logits with a plug-in, and `new.npz`."""
    words = ("--logits", save("held.npz"), "--out", "theirs", "--name", "moe")
    assert moectl("plugin", *words, "--rates", "0.1;0.3", "--costs", "0.2")[0] == 0
    np.savez("new.npz", logits=LOGITS[:60])
    return Path("theirs")


def test_a_folder_that_is_not_empty_is_no_new_run(moectl: Call, theirs: Path) -> None:
    words = ("plugin", "--logits", "held.npz", "--name", "other", "--out", "theirs")
    assert "theirs: exists and is not an empty folder" in refused(moectl(*words))
    assert [path.name for path in theirs.glob("plugins/*")] == ["moe"]


def test_a_folder_for_a_plugin_of_a_run_is_refused(moectl: Call, theirs: Path) -> None:
    assert "--out" in refused(moectl("plugin", "--run", "theirs", "--out", "new"))


@pytest.mark.parametrize(
    ("weights", "told"), [("b" * 64, "b" * 12), ("", "of unknown hash")], ids=["other", "unknown"]
)
def test_logits_of_other_weights_than_the_run_are_refused(
    moectl: Call, theirs: Path, weights: str, told: str
) -> None:
    path = save("other.npz", weights=np.array(weights))
    message = refused(moectl("plugin", "--run", "theirs", "--logits", path, "--name", "new"))
    assert f"{path}: the logits are of the weights {told}, theirs/logits.safetensors is" in message
    assert [place.name for place in theirs.glob("plugins/*")] == ["moe"]


def test_a_run_without_plugins_is_told_how_to_fit_one(moectl: Call, theirs: Path) -> None:
    shutil.rmtree("theirs/plugins")
    outcome = moectl("reject", "--run", "theirs")
    assert "theirs: no plug-in yet" in refused(outcome)
    assert "hint: moectl balpoe plugin" in outcome[2]


def broken_files() -> None:
    np.savez("other.npz", logits=LOGITS, weights=np.array("b" * 64))
    np.savez("one.npz", logits=LOGITS[:, :1])
    np.savez("wide.npz", logits=np.zeros((4, 3, 7)))
    np.savez("nan.npz", logits=at(3, np.nan, LOGITS))
    np.savez("sums.npz", posteriors=np.full((4, 3, CLASSES), 1 / 3))
    np.savez("labels.npz", logits=LOGITS, labels=np.full(ITEMS, 9))
    Path("text.npz").write_text("no archive")
    Path("short.txt").write_text("1\n2\n")
    document = json.loads(Path("theirs/plugins/moe", FILE).read_text())
    del document["points"]
    Path("damaged.json").write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--logits other.npz", "other.npz: the logits are of the weights bbbbbbbbbbbb"),
        ("--logits one.npz", "fitted to 3 expert(s) of 6 classes, the items have 1 of 6"),
        ("--logits wide.npz", "fitted to 3 expert(s) of 6 classes, the items have 3 of 7"),
        ("--logits nan.npz", "nan.npz: logits: row 3 is not finite"),
        ("--logits sums.npz", "sums.npz: posteriors: row 0 of expert 0 sums to 2"),
        ("--logits labels.npz", "labels out of range: row 0 is 9"),
        ("--logits new.npz --images .", "--logits and --images exclude each other"),
        ("--images .", "theirs: holds logits only"),
        ("--plugin mow", "theirs: no plug-in mow; did you mean moe?"),
        ("--plugin none.json", "no plug-in none.json"),
        ("--plugin damaged.json", "damaged.json: not a plug-in of moectl balpoe plugin (no"),
        ("--plugin text.npz", "text.npz: not valid JSON"),
        ("--test-prior none.txt", "label prior none.txt: expected train, uniform or a file"),
        ("--test-prior short.txt", "short.txt: holds 2 numbers, expected 6"),
        ("--test-prior text.npz", "text.npz, line 1: no archive is not a finite number"),
        ("--format xml", "'xml' is not one of"),
        ("--target-rate half", "--target-rate"),
        ("--save-dir x", "--save-dir is not an option of moectl balpoe reject"),
    ],
)
def test_what_cannot_be_judged_is_named(
    moectl: Call, theirs: Path, words: str, message: str
) -> None:
    broken_files()
    assert message in refused(moectl("reject", "--run", "theirs", "--cost", "0.2", *words.split()))


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        ("--target-rate 0.2", "rate 0.2"),
        ("--cost 0.1", "cost 0.1"),
        ("--cost nan", "cost nan"),
    ],
)
def test_a_point_that_was_not_fitted_is_refused(
    moectl: Call, theirs: Path, words: str, asked: str
) -> None:
    message = refused(moectl("reject", "--run", "theirs", *words.split()))
    assert f"{asked} is not among the fitted ones: rate 0.1, rate 0.3, cost 0.2" in message


def test_an_operating_point_must_be_named(moectl: Call, theirs: Path) -> None:
    message = refused(moectl("reject", "--run", "theirs"))
    assert "say which operating point: rate 0.1, rate 0.3, cost 0.2" in message


def test_a_rate_and_a_cost_exclude_each_other(moectl: Call, theirs: Path) -> None:
    words = ("--run", "theirs", "--target-rate", "0.1", "--cost", "0.2")
    assert "exclude each other" in refused(moectl("reject", *words))
