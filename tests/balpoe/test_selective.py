import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moectl.balpoe.fitted import posteriors
from moectl.balpoe.groups import class_groups
from moectl.balpoe.logits import Outputs
from moectl.balpoe.longtail import class_sizes, split_indices
from moectl.balpoe.plugin import fit
from moectl.balpoe.priors import label_prior
from moectl.balpoe.selective import Task, compare, methods, redivided
from moectl.balpoe.settings import BalpoeSettings, EvalSection, PluginSection

COUNTS = class_sizes(500, 10, 0.01, "exp")
TAIL = {7, 8, 9}  # at most 20 training images
TAUS = [0.0, 1.0, 2.0]
RATES = (0.0, 0.2, 0.4, 0.6, 0.8)
COSTS = (0.1, 0.4)
KINDS = ("balanced", "worst")
Both = tuple[str, dict[str, Any]]
CHOW = {"chow", "chow_ce", "chow_single"}
PLUGINS = {"plugin_single", "plugin_balpoe_avg", "moe_plugin"}
PLUGINS |= {f"{name}_worst" for name in PLUGINS}


@cache
def known_posteriors(per_class: int) -> tuple[Tensor, Tensor]:
    """Draw items of ten normal distributions; return p(class | item) in training, and the class."""
    draws = np.random.default_rng(0)
    means = 0.8 * draws.normal(size=(10, 5))
    labels = np.arange(10 * per_class) % 10
    features = means[labels] + draws.normal(size=(len(labels), 5))
    distances = ((features[:, None] - means) ** 2).sum(2)
    logits = torch.from_numpy(-distances / 2) + torch.tensor(COUNTS).double().log()
    return logits.softmax(1), torch.from_numpy(labels)


@cache
def known_outputs(per_class: int = 200) -> Outputs:
    """Let three experts say all that can be known, each as if trained with its own tau."""
    exact, labels = known_posteriors(per_class)
    prior = label_prior("train", COUNTS).log()
    logits = (exact.log()[:, None] - torch.tensor(TAUS)[:, None] * prior).float()
    val, test = (torch.from_numpy(part) for part in split_indices(labels.numpy(), 0.2, 0))
    parts = (logits[val], labels[val], logits[test], labels[test])
    names = [f"class {number}" for number in range(10)]
    return Outputs(*parts, COUNTS, TAUS, names, val.tolist(), test.tolist(), "0" * 64)


def task_of(outputs: Outputs, prior: str = "train", **changes: Any) -> Task:
    plugin = {"rates": RATES, "costs": COSTS, "iterations": 10, "rounds": 3}
    measured = {"bootstrap": 0, "trials": 1}
    for name, value in changes.items():
        (measured if name in measured else plugin)[name] = value
    settings = BalpoeSettings(
        plugin=PluginSection.model_validate(plugin), eval=EvalSection.model_validate(measured)
    )
    groups = class_groups("head_tail", COUNTS, outputs.class_names)
    return Task(outputs, settings, groups, label_prior(prior, COUNTS), seed=1)


@pytest.fixture(scope="module")
def train() -> dict[str, Any]:
    """All that is measured under the training prior."""
    return compare(task_of(known_outputs(), bootstrap=50, trials=2), {})


@pytest.fixture(scope="module")
def uniform() -> dict[str, Any]:
    """And under the uniform one."""
    return compare(task_of(known_outputs(), "uniform"), {})


@pytest.fixture(params=["train", "uniform"])
def both(request: pytest.FixtureRequest) -> Both:
    return request.param, request.getfixturevalue(request.param)["methods"]


def read(logits: Tensor, prior: str, kind: str = "poe") -> Tensor:
    return posteriors(logits, COUNTS, TAUS, label_prior(prior, COUNTS), kind)


def shares_of(labels: Tensor, prior: str) -> list[float]:
    """Weigh every item so that classes are as frequent as in the prior; the sum is 1."""
    wanted, there = label_prior(prior, COUNTS).tolist(), torch.bincount(labels).tolist()
    return [wanted[label] / there[label] for label in labels.tolist()]


def errors_by_hand(
    rejected: Sequence[bool], guesses: Sequence[int], labels: list[int], weights: list[float]
) -> dict[str, float]:
    """Count weights of accepted and of wrongly accepted items, item by item."""
    accepted, wrong, lost = [0.0, 0.0], [0.0, 0.0], 0.0
    for item, label in enumerate(labels):
        if rejected[item]:
            lost += weights[item]
            continue
        accepted[label in TAIL] += weights[item]
        wrong[label in TAIL] += weights[item] * (guesses[item] != label)
    errors = [bad / all_ for bad, all_ in zip(wrong, accepted, strict=True)]
    found = (lost, sum(errors) / 2, max(errors), sum(wrong) / sum(accepted), errors[1] - errors[0])
    names = ("rejection", "balanced_error", "worst_error", "standard_error", "gap")
    return dict(zip(names, found, strict=True))


def assert_point(curve: dict[str, Any], point: int, expected: dict[str, float]) -> None:
    assert {name: curve[name][point] for name in expected} == pytest.approx(expected, abs=1e-9)


def lowest(scores: list[float], weights: list[float], rate: float) -> tuple[list[bool], float]:
    """Reject the lowest scores while their weights fit into the rate; the first score kept."""
    rejected, total = [False] * len(scores), 0.0
    for item in sorted(range(len(scores)), key=scores.__getitem__):
        total += weights[item]
        if not rate or total > rate + 1e-9:
            return rejected, scores[item] if rate else float("-inf")
        rejected[item] = True
    return rejected, float("inf")


@pytest.mark.parametrize("kind", ["poe", "mixture", "single:0", "single:1", "single:2"])
def test_every_way_to_read_the_experts_gives_the_exact_posterior(kind: str) -> None:
    outputs, (exact, _) = known_outputs(), known_posteriors(200)
    found = read(outputs.test_logits, "train", kind)
    torch.testing.assert_close(found, exact[outputs.test_indices], rtol=0, atol=1e-5)


def test_plugins_have_lower_areas_than_chow_under_the_training_prior(train: Any) -> None:
    areas = {name: method["aurc"] for name, method in train["methods"].items()}
    for kind in KINDS:
        for plugin in PLUGINS:
            for chow in CHOW:
                better = areas[chow][kind]["normalised"] - areas[plugin][kind]["normalised"]
                assert better > 0.02, (plugin, chow, kind)
        assert areas["chow"][kind]["normalised"] < areas["balpoe"][kind]["normalised"]


def test_experts_that_agree_make_equal_rejectors(both: Both) -> None:
    for names in (
        ("chow", "chow_single"),
        ("plugin_balpoe_avg", "plugin_single", "moe_plugin"),
        ("plugin_balpoe_avg_worst", "plugin_single_worst", "moe_plugin_worst"),
    ):
        for kind in KINDS:
            areas = [both[1][name]["aurc"][kind]["normalised"] for name in names]
            # Logits are rounded, so an item at a threshold may change sides.
            assert areas == pytest.approx([areas[0]] * len(areas), abs=5e-3)


def test_the_classifier_that_always_answers_is_a_flat_line(both: Both) -> None:
    method = both[1]["balpoe"]
    assert method["curve"]["matched"] == method["curve"]["transfer"]
    curve = method["curve"]["matched"]
    assert curve["rejection"] == [0.0] * len(RATES)
    for coverage in curve["group_coverage"]:
        assert coverage == pytest.approx([1.0, 1.0], abs=1e-12)
    for kind in KINDS:
        error, area = curve[f"{kind}_error"][0], method["aurc"][kind]
        assert curve[f"{kind}_error"] == [error] * len(RATES)
        assert area["normalised"] == area["transfer"] == pytest.approx(error)
        assert area["raw"] == pytest.approx(0.8 * error)
        assert error == both[1]["chow"]["curve"]["matched"][f"{kind}_error"][0]
    outputs = known_outputs()
    guesses = outputs.test_logits.mean(1).argmax(1).tolist()  # the mean of the taus is 1
    labels, weights = outputs.test_labels.tolist(), shares_of(outputs.test_labels, both[0])
    expected = errors_by_hand([False] * len(labels), guesses, labels, weights)
    assert_point(curve, 0, expected)


def test_an_area_is_the_mean_error_over_the_rates(train: Any) -> None:
    for method in train["methods"].values():
        for kind in KINDS:
            errors, area = method["curve"]["matched"][f"{kind}_error"], method["aurc"][kind]
            mean = (errors[0] / 2 + sum(errors[1:-1]) + errors[-1] / 2) / (len(errors) - 1)
            assert area["normalised"] == pytest.approx(mean)
            assert area["raw"] == pytest.approx(0.8 * mean)
            assert area["span"] == pytest.approx(0.8)


def test_matched_rejection_meets_the_rate_but_for_one_item(both: Both) -> None:
    assert set(both[1]) == {"balpoe"} | CHOW | PLUGINS
    largest = max(shares_of(known_outputs().test_labels, both[0]))
    for name in CHOW | PLUGINS:
        found = both[1][name]["curve"]["matched"]["rejection"]
        for rejection, rate in zip(found, RATES, strict=True):
            assert rate - largest < rejection < rate + 1e-6


def test_chow_rejects_the_smallest_posteriors(both: Both) -> None:
    outputs, prior = known_outputs(), both[0]
    labels, weights = outputs.test_labels.tolist(), shares_of(outputs.test_labels, prior)
    own = shares_of(outputs.val_labels, prior)
    for name, assumed in (("chow", "uniform"), ("chow_ce", "train")):
        val, test = (
            read(part, assumed).max(1) for part in (outputs.val_logits, outputs.test_logits)
        )
        scores, guesses = test.values.tolist(), test.indices.tolist()
        for point, rate in enumerate(RATES):
            rejected, _ = lowest(scores, weights, rate)
            expected = errors_by_hand(rejected, guesses, labels, weights)
            assert_point(both[1][name]["curve"]["matched"], point, expected)
            _, threshold = lowest(val.values.tolist(), own, rate)
            rejected = [score < threshold for score in scores]
            expected = errors_by_hand(rejected, guesses, labels, weights)
            assert_point(both[1][name]["curve"]["transfer"], point, expected)


def judged(rule: dict[str, Any], row: list[float]) -> tuple[float, int]:
    """Return score and class of one item by the rule as it is published."""
    alpha, mu = ([rule[name][label in TAIL] for label in range(10)] for name in ("alpha", "mu"))
    best = [share / of for share, of in zip(row, alpha, strict=True)]
    right = sum((1 / of - m) * share for share, of, m in zip(row, alpha, mu, strict=True))
    return max(best) - right, best.index(max(best))


@pytest.mark.parametrize("name", ["plugin_balpoe_avg", "plugin_balpoe_avg_worst"])
def test_plugins_reject_by_the_rules_they_tell(both: Both, name: str) -> None:
    outputs, (prior, found) = known_outputs(), both
    labels, weights = outputs.test_labels.tolist(), shares_of(outputs.test_labels, prior)
    rows = read(outputs.test_logits, prior).tolist()
    method = found[name]
    assert len(method["rules"]) == len(RATES) + len(COSTS)
    assert method["rules"][0]["threshold"] is None  # rate 0 rejects nobody, whatever the score
    for point, rate in enumerate(RATES):
        rule = method["rules"][point]
        scores, guesses = zip(*(judged(rule, row) for row in rows), strict=True)
        limit = float("-inf") if rule["threshold"] is None else rule["threshold"]
        expected = errors_by_hand([score < limit for score in scores], guesses, labels, weights)
        assert_point(method["curve"]["transfer"], point, expected)
        rejected, _ = lowest(list(scores), weights, rate)
        expected = errors_by_hand(rejected, guesses, labels, weights)
        assert_point(method["curve"]["matched"], point, expected)


def test_thresholds_come_from_the_validation_items_alone() -> None:
    outputs = known_outputs(40)
    other = replace(outputs, test_logits=outputs.test_logits.flip(1) * 2)
    again = methods(task_of(other))
    for name, method in methods(task_of(outputs)).items():
        assert torch.equal(method.thresholds, again[name].thresholds)
        assert not torch.equal(method.scores, again[name].scores)


def test_the_difference_to_chow_lies_in_its_interval(train: Any) -> None:
    methods = train["methods"]
    for kind in KINDS:
        chow = methods["chow"]["aurc"][kind]
        assert chow["minus_chow"] is chow["minus_chow_low"] is chow["minus_chow_high"] is None
        for name in methods.keys() - {"chow"}:
            area = methods[name]["aurc"][kind]
            assert area["minus_chow"] == pytest.approx(area["normalised"] - chow["normalised"])
            low, high = area["minus_chow_low"], area["minus_chow_high"]
            assert low <= area["minus_chow"] <= high
            assert area["low"] <= area["normalised"] <= area["high"]
            # The same resamples for both: what all classifiers find hard cancels out.
            if name == "chow_single":
                assert high - low < 0.2 * (area["high"] - area["low"])


def test_without_resamples_there_are_no_intervals(uniform: Any) -> None:
    names = ("low", "high", "minus_chow_low", "minus_chow_high")
    for method in uniform["methods"].values():
        assert {method["aurc"][kind][name] for kind in KINDS for name in names} == {None}


def test_the_first_trial_is_the_main_division(train: Any, uniform: Any) -> None:
    for found, trials in ((train, 2), (uniform, 1)):
        for method in found["methods"].values():
            for area in method["aurc"].values():
                assert len(area["trials"]) == trials
                assert area["trials"][0] == area["normalised"]
                assert area["trials_mean"] == pytest.approx(sum(area["trials"]) / trials)
                assert (area["trials_half_width"] is None) == (trials == 1)


def test_a_further_trial_is_a_comparison_on_its_own_division(train: Any) -> None:
    task = task_of(known_outputs())
    own = compare(task._replace(outputs=redivided(task.outputs, 2), seed=2), {})
    for name, method in own["methods"].items():
        for kind in KINDS:
            first, second = train["methods"][name]["aurc"][kind]["trials"]
            assert first != second == method["aurc"][kind]["normalised"]


def test_items_divided_anew_keep_their_logits_labels_and_numbers() -> None:
    outputs = known_outputs(40)
    found = redivided(outputs, 7)
    assert len(found.val_labels) == len(outputs.val_labels) == 80
    for labels, per_class in ((found.val_labels, 8), (found.test_labels, 32)):
        assert torch.bincount(labels).tolist() == [per_class] * 10
    assert sorted([*found.val_indices, *found.test_indices]) == list(range(400))

    def by_number(those: Outputs) -> tuple[Tensor, Tensor]:
        order = torch.tensor([*those.val_indices, *those.test_indices]).argsort()
        logits = torch.cat([those.val_logits, those.test_logits])[order]
        return logits, torch.cat([those.val_labels, those.test_labels])[order]

    for one, other in zip(by_number(found), by_number(outputs), strict=True):
        assert torch.equal(one, other)
    again, third = (redivided(outputs, seed).val_indices for seed in (7, 8))
    assert again == found.val_indices != third != outputs.val_indices


@pytest.mark.parametrize("prior", ["train", "uniform"])
def test_a_cost_adds_to_the_error_what_is_rejected(
    request: pytest.FixtureRequest, prior: str
) -> None:
    found, outputs = request.getfixturevalue(prior), known_outputs()
    labels, weights = outputs.test_labels.tolist(), shares_of(outputs.test_labels, prior)
    top, classes = read(outputs.test_logits, "uniform").max(1)
    own = read(outputs.test_logits, prior).tolist()
    rows = {(row["method"], row["cost"]): row for row in found["costs"]}
    assert set(rows) == {(name, cost) for name in CHOW | PLUGINS for cost in COSTS}
    assert len(found["costs"]) == len(rows)
    for number, cost in enumerate(COSTS):
        rule = found["methods"]["plugin_balpoe_avg"]["rules"][len(RATES) + number]
        assert rule["threshold"] == -cost
        scores, guesses = zip(*(judged(rule, row) for row in own), strict=True)
        for name, rejected, answers in (
            ("chow", (top < 1 - cost).tolist(), classes.tolist()),
            ("plugin_balpoe_avg", [score < -cost for score in scores], guesses),
        ):
            expected = errors_by_hand(rejected, answers, labels, weights)
            paid = cost * expected["rejection"]
            assert rows[name, cost] == {
                "method": name,
                "cost": cost,
                "rejection": pytest.approx(expected["rejection"]),
                "balanced_risk": pytest.approx(expected["balanced_error"] + paid),
                "worst_risk": pytest.approx(expected["worst_error"] + paid),
            }


def test_one_expert_leaves_nothing_to_combine() -> None:
    outputs = known_outputs(40)
    val, test = outputs.val_logits[:, :1], outputs.test_logits[:, :1]
    found = methods(task_of(replace(outputs, val_logits=val, test_logits=test, taus=TAUS[:1])))
    assert set(found) == {"balpoe", "chow", "chow_ce", "plugin_single", "plugin_single_worst"}
    three = methods(task_of(outputs))["plugin_single"]  # reads another expert of equal knowledge
    torch.testing.assert_close(found["plugin_single"].scores, three.scores, rtol=1e-4, atol=1e-4)


def confused(outputs: Outputs, *experts: int, share: float = 1) -> Outputs:
    """Blur what some experts say, and keep a share of it."""
    parts = {}
    for name in ("val_logits", "test_logits"):
        logits = getattr(outputs, name).clone()
        drawn = torch.randn(len(logits), 1, 10, generator=torch.Generator().manual_seed(0))
        logits[:, list(experts)] = share * logits[:, list(experts)] + (4 - 3 * share) * drawn
        parts[name] = logits
    return replace(outputs, **parts)


def test_the_single_expert_is_the_most_balanced_one() -> None:
    outputs = known_outputs(40)
    clear, same, blurred = (
        methods(task_of(those))
        for those in (outputs, confused(outputs, 0, 2), confused(outputs, 1))
    )
    for name in ("chow_single", "plugin_single", "plugin_single_worst"):
        assert torch.equal(same[name].scores, clear[name].scores)
        assert not torch.equal(blurred[name].scores, clear[name].scores)


@pytest.mark.parametrize(("share", "items"), [(1, 200), (0, 40)])
def test_searched_weights_listen_to_the_expert_that_knows(share: float, items: int) -> None:
    # Without a clue, and from few items, some rules accept none of the tail.
    found = compare(task_of(confused(known_outputs(items), 0, 2, share=share)), {})["methods"]
    for kind in KINDS:
        areas = {name: method["aurc"][kind]["normalised"] for name, method in found.items()}
        assert areas["moe_plugin"] == areas["plugin_single"] < areas["plugin_balpoe_avg"] - 0.05


def test_a_saved_plugin_is_measured_by_its_own_rules() -> None:
    task = task_of(known_outputs(40), trials=2)
    order = {"rates": RATES[::-1], "costs": COSTS[::-1]}
    section = task.settings.plugin.model_copy(update=order)
    fitted = fit(task.outputs, section, task.seed, task.prior, task.groups)
    found = compare(task, {"mine": fitted})["methods"]
    mine, fresh = found["plugin:mine"], found["plugin_balpoe_avg"]
    assert mine["curve"] == fresh["curve"]
    assert mine["rules"] is None  # they stand in its file
    for kind in KINDS:
        assert mine["aurc"][kind]["minus_chow"] == fresh["aurc"][kind]["minus_chow"]
        # It is not fitted again, so other divisions would test it on what it has seen.
        assert mine["aurc"][kind]["trials"] == fresh["aurc"][kind]["trials"][:1]


def test_the_same_seed_gives_the_same_document() -> None:
    def document(seed: int) -> str:
        task = task_of(known_outputs(40), rates=(0, 0.5), costs=(0.3,), bootstrap=9, trials=2)
        return json.dumps(compare(task._replace(seed=seed), {}), allow_nan=False)

    assert document(1) == document(1) != document(2)
