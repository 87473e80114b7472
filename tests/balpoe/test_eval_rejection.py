import csv
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from moectl.balpoe.eval_rejection import evaluate_rejection
from moectl.balpoe.fitted import FILE, to_document
from moectl.balpoe.groups import Groups
from moectl.balpoe.inference import Classifier
from moectl.balpoe.logits import Outputs
from moectl.balpoe.plugin import fit
from moectl.balpoe.settings import BalpoeSettings
from moectl.engine.errors import UserError
from moectl.engine.files import write_json
from moectl.engine.settings import resolve

COUNTS = [300, 120, 60, 25, 12, 6]  # two classes of the tail
TAUS = [0.0, 1.0, 2.0]
RATES = [0.0, 0.3, 0.6]
METHODS = [
    "balpoe", "chow", "chow_ce", "chow_single", "plugin_single", "plugin_balpoe_avg", "moe_plugin",
    "plugin_single_worst", "plugin_balpoe_avg_worst", "moe_plugin_worst", "plugin:mine",
]  # fmt: skip
TITLES = {
    "balpoe": "BalPoE",
    "plugin_single": "Plugin_Single",
    "plugin_balpoe_avg": "Plugin_BalPoE_avg",
    "moe_plugin": "MoE_Plugin",
}
PRIORS = ("train", "uniform")
FILES = {
    "metrics.json", "config.json", "aurc_comparison.json", "accuracy_comparison.json",
    "risk_coverage_results.json", "detailed_results.json", "risk_coverage.csv",
}  # fmt: skip


def settings_of(*assignments: str) -> BalpoeSettings:
    few = ["plugin.iterations=5", "plugin.rounds=2"]
    if not any(assignment.startswith("plugin.rates") for assignment in assignments):
        few.append(f"plugin.rates={RATES}")
    if not any(assignment.startswith("eval.trials") for assignment in assignments):
        few += ["eval.trials=1", "eval.bootstrap=0"]
    return resolve(BalpoeSettings, {}, [*few, *assignments], [])[0]


def classifier(folder: Path, counts: list[int] = COUNTS) -> Classifier:
    """Make up experts that know something, each in favour of its own end of the classes."""
    draws = torch.Generator().manual_seed(0)
    labels = torch.arange(240) % 6
    logits = torch.randn(240, 3, 6, generator=draws)
    logits += 2.5 * torch.nn.functional.one_hot(labels, 6)[:, None]
    prior = (torch.tensor(counts) / sum(counts)).log()
    logits += (1 - torch.tensor(TAUS))[:, None] * prior
    names = [f"class {number}" for number in range(6)]
    parts = (logits[:90], labels[:90], logits[90:], labels[90:])
    val, test = list(range(90)), list(range(90, 240))
    outputs = Outputs(*parts, counts, TAUS, names, val, test, "a" * 64)
    weights = {"file": "checkpoint-epoch3.pth", "sha256": "a" * 64, "epoch": 3}
    return Classifier(outputs, folder, weights, "last", is_main=True)


def save_plugin(
    found: Classifier,
    settings: BalpoeSettings,
    groups: Groups | None = None,
    weights: dict[str, Any] | None = None,
) -> None:
    fitted = fit(found.outputs, settings.plugin, settings.train.seed, groups=groups)
    folder = found.folder / "plugins" / "mine"
    folder.mkdir(parents=True)
    write_json(folder / FILE, to_document(replace(fitted, weights=weights or found.weights)))


class Measured:
    """One evaluation with everything in it, and its files."""

    def __init__(self, folder: Path) -> None:
        found = classifier(folder)
        self.outputs = found.outputs
        self.settings = settings_of("plugin.costs=[0.2]", "eval.trials=2", "eval.bootstrap=20")
        save_plugin(found, self.settings)
        document = evaluate_rejection(found, self.settings, ["mine"])
        assert document is not None
        self.document = document
        self.folder = folder / "evals" / "rejection@last"
        self.methods = [
            (prior, name, method)
            for prior, part in document["priors"].items()
            for name, method in part["methods"].items()
        ]

    def read(self, name: str) -> Any:
        def refuse(word: str) -> NoReturn:
            raise AssertionError(f"{name} holds {word}")

        return json.loads((self.folder / name).read_text(), parse_constant=refuse)

    def table(self, name: str) -> list[tuple[tuple[str, str, dict[str, Any]], dict[str, Any]]]:
        """Pair each method with its entry in a file."""
        entries = self.read(name)
        for (prior, method, _), entry in zip(self.methods, entries, strict=True):
            assert (entry["Method"], entry["Label prior"]) == (TITLES.get(method, method), prior)
        return list(zip(self.methods, entries, strict=True))


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    return Measured(tmp_path_factory.mktemp("runs") / "run")


def test_the_document_tells_what_was_measured(measured: Measured) -> None:
    document = measured.document
    assert measured.read("metrics.json") == document
    assert {path.name for path in measured.folder.iterdir()} == FILES
    assert document["weights"]["sha256"] == "a" * 64
    assert document["groups"] == {"names": ["head", "tail"], "of_class": [0, 0, 0, 0, 1, 1]}
    assert document["rates"] == RATES
    assert (document["val_images"], document["test_images"]) == (90, 150)
    assert (document["trials"], document["bootstrap"]) == (2, 20)
    assert [(prior, name) for prior, name, _ in measured.methods] == [
        (prior, name) for prior in PRIORS for name in METHODS
    ]
    for part in document["priors"].values():
        assert {row["method"] for row in part["costs"]} == set(METHODS) - {"balpoe"}


def test_the_settings_are_kept_beside_the_results(measured: Measured) -> None:
    config = measured.read("config.json")
    assert config == measured.settings.plugin.model_dump(mode="json")
    assert config == measured.document["config"]
    assert (config["rates"], config["costs"], config["rounds"]) == (RATES, [0.2], 2)


def test_areas_are_compared_as_numbers(measured: Measured) -> None:
    for (_, _, method), entry in measured.table("aurc_comparison.json"):
        numbers = {name: value for name, value in entry.items() if "AURC" in name}
        assert all(type(value) is float and 0 <= value <= 1 for value in numbers.values())
        balanced, worst = method["aurc"]["balanced"], method["aurc"]["worst"]
        assert numbers == {
            "Balanced AURC": balanced["normalised"],
            "Worst-Group AURC": worst["normalised"],
            "Balanced AURC raw": balanced["raw"],
            "Worst-Group AURC raw": worst["raw"],
        }
        assert entry["Balanced AURC raw"] == pytest.approx(0.6 * entry["Balanced AURC"])
        assert entry["Span"] == pytest.approx(0.6)


def test_accuracies_are_those_of_a_classifier_that_answers_always(measured: Measured) -> None:
    outputs = measured.outputs
    for (prior, name, method), entry in measured.table("accuracy_comparison.json"):
        curve = method["curve"]["matched"]
        assert entry["Rejection"] == 0
        assert entry["Accuracy"] == 1 - curve["standard_error"][0]
        assert entry["Balanced accuracy"] == 1 - curve["balanced_error"][0]
        assert entry["Worst-group accuracy"] == 1 - curve["worst_error"][0]
        if (prior, name) == ("uniform", "balpoe"):
            hits = outputs.test_logits.mean(1).argmax(1) == outputs.test_labels
            tail = outputs.test_labels > 3
            groups = [float(hits[those].double().mean()) for those in (~tail, tail)]
            assert entry["Accuracy"] == pytest.approx(float(hits.double().mean()))
            assert entry["Balanced accuracy"] == pytest.approx(sum(groups) / 2)
            assert entry["Worst-group accuracy"] == pytest.approx(min(groups))


def test_accuracies_are_at_the_lowest_rate_wherever_it_stands(tmp_path: Path) -> None:
    settings = settings_of("plugin.rates=[0.6,0.2,0.4]")
    assert evaluate_rejection(classifier(tmp_path), settings) is not None
    path = tmp_path / "evals" / "rejection@last" / "accuracy_comparison.json"
    rows = [row for row in json.loads(path.read_text()) if row["Label prior"] == "uniform"]
    assert rows[0] == {**rows[0], "Method": "BalPoE", "Rejection": 0}
    for row in rows[1:]:
        assert row["Rejection"] == pytest.approx(0.2)


def test_the_curves_stand_in_a_file_of_their_own(measured: Measured) -> None:
    for (_, _, method), entry in measured.table("risk_coverage_results.json"):
        assert {name: entry[name] for name in ("matched", "transfer")} == method["curve"]
        assert set(entry) == {"Method", "Label prior", "matched", "transfer"}


def test_details_hold_a_value_for_each_trial(measured: Measured) -> None:
    for (_, name, method), entry in measured.table("detailed_results.json"):
        for column, kind in (("Balanced AURC", "balanced"), ("Worst-Group AURC", "worst")):
            assert entry[column] == method["aurc"][kind]["trials"]
            assert len(entry[column]) == (1 if name == "plugin:mine" else 2)
            assert entry[column][0] == method["aurc"][kind]["normalised"]


def test_the_curves_stand_in_a_table_with_a_line_for_each_point(measured: Measured) -> None:
    with (measured.folder / "risk_coverage.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [
        (row["label_prior"], row["method"], row["threshold"], float(row["rate"])) for row in rows
    ] == [
        (prior, name, kind, rate)
        for prior in PRIORS
        for name in METHODS
        for kind in ("matched", "transfer")
        for rate in RATES
    ]
    empty = 0
    for number, row in enumerate(rows):
        methods = measured.document["priors"][row["label_prior"]]["methods"]
        curve, point = methods[row["method"]]["curve"][row["threshold"]], number % len(RATES)
        expected = {
            name: curve[name][point]
            for name in ("rejection", "balanced_error", "worst_error", "standard_error", "gap")
        }
        for group, name in enumerate(("head", "tail")):
            expected[f"error_{name}"] = curve["group_errors"][point][group]
            expected[f"coverage_{name}"] = curve["group_coverage"][point][group]
        assert {name: float(row[name]) if row[name] else None for name in expected} == expected
        empty += row["error_tail"] == ""
    # Chow's rule under the training prior rejects the whole tail, which then has no error.
    assert empty > 0


def test_a_group_of_which_nothing_is_accepted_counts_as_wrong(measured: Measured) -> None:
    curve = measured.document["priors"]["train"]["methods"]["chow_ce"]["curve"]["matched"]
    head, tail = curve["group_errors"][2]
    assert tail is None
    assert curve["gap"][2] is None
    assert curve["group_coverage"][2][1] == 0
    assert curve["worst_error"][2] == 1
    assert curve["balanced_error"][2] == pytest.approx((1 + head) / 2)
    assert curve["standard_error"][2] == pytest.approx(head)


def test_a_saved_plugin_equals_the_one_that_is_fitted_alike(measured: Measured) -> None:
    train, uniform = (measured.document["priors"][prior]["methods"] for prior in PRIORS)
    assert train["plugin:mine"]["curve"] == train["plugin_balpoe_avg"]["curve"]
    own, fresh = (train[name]["aurc"]["balanced"] for name in ("plugin:mine", "plugin_balpoe_avg"))
    for name in ("normalised", "low", "high", "minus_chow", "transfer"):
        assert own[name] == fresh[name]
    # It was fitted for the training prior and does not know of the other.
    assert uniform["plugin:mine"]["curve"] != uniform["plugin_balpoe_avg"]["curve"]


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Any:
    """The log, even if an earlier command has sent it to stderr alone."""
    monkeypatch.setattr(logging.getLogger("moectl"), "propagate", True)
    return caplog


def test_without_a_tail_nothing_is_measured_or_written(tmp_path: Path, heard: Any) -> None:
    found = classifier(tmp_path, [300, 120, 60, 50, 40, 30])
    assert evaluate_rejection(found, settings_of()) is None
    assert "rejection is not measured: plugin.groups is head_tail, but no class" in heard.text
    assert not (tmp_path / "evals").exists()


def test_without_rates_nothing_is_measured_or_written(tmp_path: Path, heard: Any) -> None:
    settings = settings_of("plugin.rates=[]", "plugin.costs=[0.2]")
    assert evaluate_rejection(classifier(tmp_path), settings) is None
    assert "rejection is not measured: plugin.rates is empty" in heard.text
    assert not (tmp_path / "evals").exists()


def refused(found: Classifier, settings: BalpoeSettings) -> str:
    with pytest.raises(UserError) as caught:
        evaluate_rejection(found, settings, ["mine"])
    assert not (found.folder / "evals").exists()
    return caught.value.message


def test_a_saved_plugin_of_other_weights_is_refused(tmp_path: Path) -> None:
    found = classifier(tmp_path)
    other = {**found.weights, "sha256": "b" * 64}
    save_plugin(found, settings_of(), weights=other)
    message = refused(found, settings_of())
    assert message == "plug-in mine: fitted to the weights bbbbbbbbbbbb, these are aaaaaaaaaaaa"


def test_a_saved_plugin_for_other_groups_is_refused(tmp_path: Path) -> None:
    found = classifier(tmp_path)
    save_plugin(found, settings_of(), Groups(("big", "small"), (0, 0, 0, 1, 1, 1)))
    message = refused(found, settings_of())
    assert message == "plug-in mine: fitted for the groups big, small, measured are head, tail"


def test_a_saved_plugin_without_a_rule_for_a_rate_is_refused(tmp_path: Path) -> None:
    found = classifier(tmp_path)
    save_plugin(found, settings_of())
    message = refused(found, settings_of("plugin.rates=[0.0,0.5]"))
    assert "plug-in mine: rate 0.5 is not among the fitted ones" in message


def test_a_plugin_that_was_asked_for_must_be_there(tmp_path: Path) -> None:
    assert "no plug-in mine" in refused(classifier(tmp_path), settings_of())


def test_a_plugin_that_was_asked_for_wants_groups_that_are_there(tmp_path: Path) -> None:
    found = classifier(tmp_path)
    save_plugin(found, settings_of())
    assert "no class has 3" in refused(found, settings_of("plugin.tail_threshold=3"))
