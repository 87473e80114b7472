import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moectl.balpoe import plugin as module
from moectl.balpoe.fitted import FILE, posteriors, read_plugin, to_document
from moectl.balpoe.groups import Groups
from moectl.balpoe.inference import LOGITS
from moectl.balpoe.logits import Outputs, read_outputs, write_outputs
from moectl.balpoe.plugin import fit, method_of
from moectl.balpoe.settings import BalpoeSettings, PluginSection
from moectl.cli import _run
from moectl.engine import plot
from moectl.engine.errors import UserError
from moectl.engine.files import sha256, write_json, write_text
from moectl.engine.settings import from_toml, to_toml

COUNTS = [400, 200, 110, 60, 15, 8]
NAMES = ["ant", "bee", "cat", "dog", "eel", "fox"]
TAUS = (0.0, 1.0, 2.0)


def sample(
    taus: Sequence[float] = TAUS, per_class: int = 40, noise: float = 0.0, scale: float = 1.6
) -> tuple[np.ndarray, np.ndarray]:
    """Draw logits (N, E, C) of experts that know the six Gaussian classes, and labels (N,)."""
    draws = np.random.default_rng(5)
    labels = np.arange(per_class * len(COUNTS)) % len(COUNTS)
    means = scale * draws.normal(size=(len(COUNTS), 4))
    points = means[labels] + draws.normal(size=(len(labels), 4))
    known = -0.5 * ((points[:, None] - means) ** 2).sum(2)
    prior = np.log(np.array(COUNTS) / sum(COUNTS))
    logits = np.stack([known + (1 - tau) * prior for tau in taus], 1)
    logits += noise * draws.normal(size=logits.shape)
    return logits.astype(np.float32), labels


def outputs(taus: Sequence[float] = TAUS, **options: Any) -> Outputs:
    """Give the even rows to validation and the odd ones to the test."""
    logits, labels = (torch.from_numpy(array) for array in sample(taus, **options))
    rows = torch.arange(len(labels))
    val, test = (rows // len(COUNTS) % 2 == part for part in (0, 1))
    return Outputs(
        logits[val], labels[val], logits[test], labels[test], COUNTS, list(taus), NAMES,
        rows[val].tolist(), rows[test].tolist(), "",
    )  # fmt: skip


def section(**changes: Any) -> PluginSection:
    return PluginSection(**{"rates": (0.0, 0.2, 0.4), **changes})


OUTPUTS = outputs()


# Combining experts


def test_a_single_expert_is_a_classifier_of_its_own() -> None:
    alone = replace(
        OUTPUTS,
        val_logits=OUTPUTS.val_logits[:, 1:2],
        test_logits=OUTPUTS.test_logits[:, 1:2],
        taus=[1.0],
    )
    one = fit(OUTPUTS, section(posterior="single:1"), 0)
    for kind in ("poe", "mixture", "single:0"):
        two = fit(alone, section(posterior=kind), 0)
        torch.testing.assert_close(two.plugin.alpha, one.plugin.alpha)
        torch.testing.assert_close(two.plugin.thresholds, one.plugin.thresholds)
        torch.testing.assert_close(two.plugin.errors, one.plugin.errors)


@pytest.mark.parametrize("kind", ["poe", "mixture", "single:0"])
def test_a_plugin_says_how_it_combines_experts(kind: str) -> None:
    noisy = outputs(noise=0.7)
    found = fit(noisy, section(posterior=kind), 3)
    shares = torch.full((3,), 1 / 3, dtype=torch.float64)
    expected = posteriors(noisy.val_logits, COUNTS, TAUS, found.prior, kind, shares)
    torch.testing.assert_close(found.posteriors(noisy.val_logits), expected)
    assert (found.posterior, found.expert_weights) == (kind, pytest.approx([1 / 3] * 3))


def test_mixture_and_product_of_noisy_experts_differ() -> None:
    noisy = outputs(noise=0.7)
    one, two = (fit(noisy, section(posterior=kind), 0).plugin for kind in ("poe", "mixture"))
    assert not torch.allclose(one.thresholds[1:], two.thresholds[1:])


def test_expert_weights_may_be_a_list() -> None:
    found = fit(OUTPUTS, section(expert_weights=[1, 1, 2]), 0)
    assert found.expert_weights == [0.25, 0.25, 0.5]


@pytest.mark.parametrize("weights", ["1;2", [1, 1, 1, 1], "1"])
def test_expert_weights_of_another_length_are_refused(weights: Any) -> None:
    with pytest.raises(UserError, match=r"expert_weights has \d numbers? for 3 experts"):
        fit(OUTPUTS, section(expert_weights=weights), 0)


def test_the_grid_gives_a_useless_expert_the_least_weight() -> None:
    noisy = outputs(noise=0.5, per_class=80)
    draws = torch.Generator().manual_seed(0)
    logits = noisy.val_logits.clone()
    logits[:, 1] = 4 * torch.randn(logits[:, 1].shape, generator=draws)
    spoiled = replace(noisy, val_logits=logits)
    found = fit(spoiled, section(expert_weights="grid", label_prior="uniform"), 0)
    assert found.expert_weights[1] < min(found.expert_weights[0], found.expert_weights[2])
    even = fit(spoiled, section(label_prior="uniform"), 0)
    assert found.plugin.errors.mean() < even.plugin.errors.mean()


def test_the_grid_is_the_simplex_in_fifths() -> None:
    points = torch.stack(module._simplex(3))
    assert points.shape == (21, 3)
    assert len({tuple(row) for row in points.tolist()}) == 21
    torch.testing.assert_close(points.sum(1), torch.ones(21, dtype=torch.float64))
    torch.testing.assert_close((points * 5).round() / 5, points)
    assert float(points[0].max()) == pytest.approx(0.4), "the most even ones first"
    assert [point.tolist() for point in module._simplex(1)] == [[1.0]]


@pytest.mark.parametrize("experts", [8, 16])
def test_a_grid_over_many_experts_is_refused(experts: int) -> None:
    many = outputs([1.0] * experts)
    with pytest.raises(UserError, match=f"too large for {experts} experts") as refusal:
        fit(many, section(expert_weights="grid"), 0)
    assert "equal" in refusal.value.hint


def test_an_expert_alone_needs_no_grid() -> None:
    found = fit(OUTPUTS, section(expert_weights="grid", posterior="single:1"), 0)
    assert found.expert_weights == pytest.approx([1 / 3] * 3)


# Label priors


def test_label_priors_by_name_and_by_file() -> None:
    write_text(Path("counts.txt"), "".join(f"{count}\n" for count in COUNTS))
    train, uniform, file = (
        fit(OUTPUTS, section(label_prior=kind), 0) for kind in ("train", "uniform", "counts.txt")
    )
    assert train.prior.tolist() == pytest.approx([count / sum(COUNTS) for count in COUNTS])
    assert uniform.prior.tolist() == pytest.approx([1 / 6] * 6)
    assert torch.equal(file.prior, train.prior)
    assert torch.equal(file.plugin.alpha, train.plugin.alpha)
    assert not torch.allclose(uniform.plugin.alpha, train.plugin.alpha)


def test_shares_of_the_groups_follow_the_label_prior() -> None:
    for kind, tail in (("train", 23 / sum(COUNTS)), ("uniform", 2 / 6)):
        plugin = fit(OUTPUTS, section(label_prior=kind, rates=(0.0,)), 0).plugin
        # Nothing is rejected: the first start of the search is the prior itself.
        assert plugin.trace["alpha"][0, 0, 1] / 2 == pytest.approx(tail)


def test_a_prior_may_be_given_instead_of_the_setting() -> None:
    uniform = torch.full((6,), 1 / 6, dtype=torch.float64)
    one = fit(OUTPUTS, section(), 0, uniform).plugin
    two = fit(OUTPUTS, section(label_prior="uniform"), 0).plugin
    assert torch.equal(one.thresholds, two.thresholds)


# Groups, objectives and operating points


@pytest.mark.parametrize(
    ("kind", "names", "of_class"),
    [
        ("head_tail", ("head", "tail"), (0, 0, 0, 0, 1, 1)),
        ("shots", ("many", "medium", "few"), (0, 0, 0, 1, 2, 2)),
        ("class", tuple(NAMES), (0, 1, 2, 3, 4, 5)),
        ("quantile:0.5", ("head", "tail"), (0, 0, 0, 1, 1, 1)),
        ("pets.json", ("pets", "wild"), (1, 1, 0, 0, 1, 1)),
        ("pets.toml", ("pets", "wild"), (1, 1, 0, 0, 1, 1)),
    ],
)
def test_groups_of_every_kind(kind: str, names: tuple[str, ...], of_class: tuple[int, ...]) -> None:
    write_json(Path("pets.json"), {"pets": ["cat", 3], "wild": ["ant", "bee", 4, "fox"]})
    write_text(Path("pets.toml"), 'pets = ["cat", 3]\nwild = ["ant", "bee", 4, "fox"]\n')
    found = fit(OUTPUTS, section(groups=kind), 0).plugin
    assert found.groups == Groups(names, of_class)
    assert found.alpha.shape == found.mu.shape == found.errors.shape == (3, len(names))


def test_the_tail_threshold_moves_classes() -> None:
    found = fit(OUTPUTS, section(tail_threshold=100), 0).plugin
    assert found.groups.of_class == (0, 0, 0, 1, 1, 1)


def test_objectives_set_the_weights_of_the_groups() -> None:
    balanced = fit(OUTPUTS, section(), 0).plugin
    listed = fit(OUTPUTS, section(objective=[1, 3]), 0).plugin
    worst = fit(OUTPUTS, section(objective="worst", rounds=4), 0).plugin
    assert balanced.beta.tolist() == [[0.5, 0.5]] * 3
    assert listed.beta.tolist() == [[0.25, 0.75]] * 3
    assert worst.beta.sum(1).tolist() == pytest.approx([1] * 3)
    assert len(worst.trace["objective"]) == 4
    assert len(balanced.trace["objective"]) == 30


def test_a_weight_of_the_tail_helps_the_tail() -> None:
    hard = outputs(scale=0.8, per_class=80)
    light, heavy = (
        fit(hard, section(objective=[1, weight], rates=(0.2,)), 0).plugin.errors[0]
        for weight in (0.05, 20)
    )
    assert heavy[1] < light[1]
    assert heavy[0] > light[0]


def test_rates_come_before_costs() -> None:
    plugin = fit(OUTPUTS, section(rates=(0.2, 0.1), costs=(0.5, 0.05)), 0).plugin
    assert plugin.rates == (0.2, 0.1, None, None)
    assert plugin.costs == (None, None, 0.5, 0.05)
    assert plugin.thresholds[2:].tolist() == [-0.5, -0.05]
    assert plugin.rejection[0] > plugin.rejection[1]
    assert plugin.rejection[3] > plugin.rejection[2]


def test_the_rejected_share_is_the_target_within_one_item() -> None:
    rates = (0.0, 0.1, 0.37, 0.6)
    found = fit(outputs(noise=0.3), section(rates=rates, label_prior="uniform"), 0)
    items = len(OUTPUTS.val_labels)
    for rate, share in zip(rates, found.plugin.rejection.tolist(), strict=True):
        assert rate - 1 / items < share <= rate + 1e-9


def test_the_multipliers_of_a_grid_are_its_candidates() -> None:
    lambdas = (0.0, 2.5, -4.0)
    hard = outputs(scale=0.8)
    found = fit(hard, section(mu_method="grid", lambdas=lambdas, costs=(0.2,)), 0)
    chosen = [point["lambda_0"] for point in to_document(found)["points"]]
    assert all(min(abs(number - value) for value in lambdas) < 1e-9 for number in chosen)
    free = [point["lambda_0"] for point in to_document(fit(hard, section(), 0))["points"]]
    assert any(min(abs(number - value) for value in lambdas) > 1e-3 for number in free)


def test_the_method_is_what_the_settings_say() -> None:
    chosen = section(
        objective="worst", mu_method="grid", lambdas=(1.0,), iterations=7, rounds=3,
        step_size=0.5, keep="last",
    )  # fmt: skip
    method = method_of(chosen, 11)
    assert (method.objective, method.multipliers, method.lambdas) == ("worst", "grid", (1.0,))
    assert (method.iterations, method.rounds, method.step_size) == (7, 3, 0.5)
    assert (method.keep, method.seed) == ("last", 11)
    assert method_of(section(objective="3;1"), 0).objective == (0.75, 0.25)
    assert method_of(section(), 0).objective == "balanced"


def test_miscalibrated_posteriors_do_not_pass_in_silence(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("moectl"), "propagate", True)
    fit(outputs(per_class=200), section(label_prior="uniform"), 0)
    assert caplog.text == ""
    fit(outputs(noise=8.0), section(label_prior="uniform"), 0)
    assert "the posteriors are off by" in caplog.text


# On the command line

Outcome = tuple[int, str, str]
Call = Callable[..., Outcome]
BASE = ("--rates", "0.1;0.3", "--quiet")


@pytest.fixture
def moectl(capsys: pytest.CaptureFixture[str]) -> Call:
    def call(*words: str) -> Outcome:
        code = _run(["balpoe", *words])
        return code, *capsys.readouterr()

    return call


def file_of(path: str = "outputs.npz", **changes: Any) -> str:
    """Write logits of all items; None leaves an array out."""
    logits, labels = sample()
    arrays = {"logits": logits, "labels": labels, "class_counts": COUNTS, "taus": TAUS}
    arrays = arrays | {"class_names": np.array(NAMES)} | changes
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})
    return path


def document_of(path: str | Path) -> Any:
    return json.loads(Path(path).read_text())


@pytest.fixture
def run() -> Path:
    """A run of logits, as `plugin --logits` leaves it."""
    folder = Path("made")
    folder.mkdir()
    write_text(folder / "settings.toml", to_toml(BalpoeSettings()))
    record = {"run": "balpoe/made", "room": "balpoe", "name": "made", "status": "finished"}
    write_json(folder / "run.json", {**record, "threads": 1, "precision": "no"})
    write_outputs(folder / LOGITS, replace(OUTPUTS, weights="a" * 64))
    return folder


def test_a_plugin_of_a_run_is_kept_in_it(moectl: Call, run: Path) -> None:
    code, out, err = moectl("plugin", "--run", "made", *BASE)
    assert (code, err) == (0, "")
    assert out == f"made/plugins/plugin/{FILE}\n"
    document = document_of(out.strip())
    assert document["checkpoint"] == {"file": LOGITS, "sha256": "a" * 64, "epoch": 0}
    assert [point["rate"] for point in document["points"]] == [0.1, 0.3]
    assert document["class_names"] == NAMES
    expected = fit(OUTPUTS, PluginSection(rates=(0.1, 0.3)), 1).plugin
    assert torch.equal(read_plugin(Path(out.strip())).plugin.alpha, expected.alpha)


@pytest.mark.parametrize("option", ["--run", "--experts-dir", "--experts_dir"])
def test_the_run_has_its_original_name(moectl: Call, run: Path, option: str) -> None:
    code, out, _ = moectl("plugin", option, "made", *BASE)
    assert (code, out) == (0, f"made/plugins/plugin/{FILE}\n")


def test_the_result_as_json_is_the_document(moectl: Call, run: Path) -> None:
    code, out, _ = moectl("plugin", "--run", "made", "--json", *BASE)
    assert code == 0
    document = json.loads(out)
    place = document.pop("file")
    assert document == document_of(place)


def test_every_point_is_told(moectl: Call, run: Path) -> None:
    _, _, err = moectl("plugin", "--run", "made", "--rates", "0.1", "--costs", "0.2")
    lines = err.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["rate 0.1", "cost 0.2"]
    assert all("balanced error" in line for line in lines)


def test_the_same_fit_again_is_the_same_file(moectl: Call, run: Path) -> None:
    place = Path(moectl("plugin", "--run", "made", *BASE)[1].strip())
    before = place.read_bytes()
    assert moectl("plugin", "--run", "made", *BASE)[1].strip() == str(place)
    assert place.read_bytes() == before
    assert len(list(run.glob("plugins/*"))) == 1


def test_another_fit_of_the_same_name_gets_a_number(moectl: Call, run: Path) -> None:
    name = ("--run", "made", "--name", "moe")
    first = Path(moectl("plugin", *name, *BASE)[1].strip())
    before = first.read_bytes()
    second = moectl("plugin", *name, *BASE, "--objective", "worst")[1].strip()
    third = moectl("plugin", *name, *BASE, "--label-prior", "uniform")[1].strip()
    again = moectl("plugin", *name, *BASE, "--objective", "worst")[1].strip()
    places = [Path(place).parent.name for place in (first, second, third, again)]
    assert places == ["moe", "moe-2", "moe-3", "moe-2"]
    assert first.read_bytes() == before
    assert document_of(second)["objective"] == "worst"


@pytest.mark.xfail(strict=True, reason="a fit is told from another by its settings alone")
def test_other_contents_of_a_groups_file_are_another_fit(moectl: Call, run: Path) -> None:
    words = ("plugin", "--run", "made", "--groups", "g.json", *BASE)
    write_json(Path("g.json"), {"one": [0, 1, 2], "two": [3, 4, 5]})
    first = moectl(*words)[1]
    write_json(Path("g.json"), {"one": [0, 2, 4], "two": [1, 3, 5]})
    assert moectl(*words)[1] != first


def test_a_preset_names_the_plugin(moectl: Call, run: Path) -> None:
    Path("strict.toml").write_text('[plugin]\nobjective = "worst"\nrates = [0.2]\n')
    code, out, _ = moectl("plugin", "--run", "made", "--preset", "strict.toml", "--quiet")
    assert (code, out) == (0, f"made/plugins/strict/{FILE}\n")
    assert document_of(out.strip())["objective"] == "worst"


def test_logits_of_any_classifier_become_a_run(moectl: Call) -> None:
    path = file_of()
    digest = sha256(Path(path).read_bytes())
    code, out, _ = moectl("plugin", "--logits", path, *BASE, "--name", "theirs")
    assert code == 0
    folder = Path(out.strip()).parents[2]
    assert folder.parent == Path("runs/balpoe")
    assert folder.name.startswith("theirs-")
    record = document_of(folder / "run.json")
    assert record["parents"] == [{"path": path, "sha256": digest}]
    assert (record["status"], record["command"]) == ("finished", "plugin")
    kept, given = read_outputs(folder / LOGITS, 0.5, 0), read_outputs(Path(path), 0.2, 1)
    assert kept.weights == digest
    assert torch.equal(kept.val_logits, given.val_logits)
    assert torch.equal(kept.test_labels, given.test_labels)
    assert kept.test_indices == given.test_indices
    assert document_of(out.strip())["checkpoint"]["sha256"] == digest


def test_a_run_of_logits_is_a_run_like_others(
    moectl: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plot, "_save", lambda _, path: path.write_bytes(b""))
    first = moectl("plugin", "--logits", file_of(), "--out", "theirs", *BASE)[1].strip()
    assert first == f"theirs/plugins/plugin/{FILE}"
    before = document_of(first)
    assert moectl("plugin", "--run", "theirs", *BASE)[:2] == (0, f"{first}\n")
    assert document_of(first) == before
    code, out, _ = moectl("eval", "--run", "theirs", "--no-rejection", "--json", "--quiet")
    assert code == 0
    assert json.loads(out)["weights"] == before["checkpoint"]
    assert json.loads(out)["images"] == 192
    assert Path("theirs/evals/test@logits.json").is_file()
    code, out, _ = moectl("reject", "--run", "theirs", "--target-rate", "0.3", "--quiet")
    assert code == 0
    assert len(out.splitlines()) == 192


def test_logits_may_be_probabilities_of_one_classifier(moectl: Call) -> None:
    logits, _ = sample()
    exact = np.exp(logits[:, 0] - logits[:, 0].max(1, keepdims=True))
    exact /= exact.sum(1, keepdims=True)
    one = file_of("one.npz", logits=logits[:, 0], taus=None)
    two = file_of("two.npz", logits=None, posteriors=exact, taus=None)
    fits = [
        document_of(moectl("plugin", "--logits", path, *BASE)[1].strip()) for path in (one, two)
    ]
    for left, right in zip(*(document["points"] for document in fits), strict=True):
        assert left["alpha"] == pytest.approx(right["alpha"], rel=1e-4)
        assert left["group_errors"] == pytest.approx(right["group_errors"])


def test_the_division_of_a_file_follows_the_settings(moectl: Call) -> None:
    words = ("--set", "data.val_fraction=0.5", "--set", "train.seed=4")
    out = moectl("plugin", "--logits", file_of(), *BASE, *words)[1].strip()
    kept = read_outputs(Path(out).parents[2] / LOGITS, 0.2, 1)
    given = read_outputs(Path("outputs.npz"), 0.5, 4)
    assert kept.val_indices == given.val_indices
    assert document_of(out)["config"]["seed"] == 4


def test_the_settings_of_a_run_of_logits_describe_the_classifier(moectl: Call) -> None:
    arrays = {"logits": sample((0.0, 1.5))[0], "taus": (0.0, 1.5)}
    moectl("plugin", "--logits", file_of(**arrays), "--out", "theirs", *BASE)
    settings = from_toml(BalpoeSettings, Path("theirs/settings.toml"))
    assert (settings.model.experts, settings.taus) == (2, (0.0, 1.5))
    assert settings.plugin.rates == (0.1, 0.3)
    assert settings.data.dataset == "list"


def test_logits_of_the_weights_of_the_run_are_taken(moectl: Call, run: Path) -> None:
    first = moectl("plugin", "--run", "made", *BASE)[1]
    again = moectl("plugin", "--run", "made", "--logits", f"made/{LOGITS}", *BASE)
    assert again[:2] == (0, first)


# What is refused


def refused(outcome: Outcome) -> str:
    """Return the one sentence of a refusal."""
    code, out, err = outcome
    assert (code, out) == (2, ""), err
    assert "Traceback" not in err
    lines = err.splitlines()
    assert lines[0].startswith("error: ")
    assert all(line.startswith("hint: ") for line in lines[1:])
    return lines[0]


@pytest.mark.parametrize("weights", ["b" * 64, ""])
def test_logits_of_other_weights_are_refused(moectl: Call, run: Path, weights: str) -> None:
    path = file_of(weights=np.array(weights))
    message = refused(moectl("plugin", "--run", "made", "--logits", path, *BASE))
    assert path in message
    assert f"made/{LOGITS} is {'a' * 12}" in message
    assert ("b" * 12 if weights else "unknown hash") in message
    assert not (run / "plugins").exists()


def divided(**changes: Any) -> dict[str, Any]:
    logits, labels = sample()
    return {
        "logits": None, "labels": None, "val_logits": logits[:120], "val_labels": labels[:120],
        "test_logits": logits[120:], "test_labels": labels[120:], **changes,
    }  # fmt: skip


def posteriors_of(row_sum: float) -> dict[str, Any]:
    shares = np.full((240, 3, 6), 1 / 6)
    shares[7] *= row_sum
    return {"logits": None, "posteriors": shares}


LABELS = sample()[1]


@pytest.mark.parametrize(
    ("arrays", "words", "message"),
    [
        (
            {"class_counts": [5000, 2997, 1796, 1077, 645, 387]},
            "",
            "no class has 20 training images or fewer, so the group tail is empty",
        ),
        ({}, "--groups head_tail --tail-threshold 900", "the group head is empty"),
        ({"class_counts": [90] * 6}, "--groups shots", "so many and few are empty"),
        (
            divided(val_labels=LABELS[:120] % 4),
            "",
            "group tail has no item to fit on",
        ),
        (
            {},
            "--groups class --rates 0.99",
            "has no accepted item at rejection rate 0.99",
        ),
        (posteriors_of(1.5), "", "row 7 of expert 0 sums to 1.5"),
        ({"labels": np.where(np.arange(240) == 9, 6, LABELS)}, "", "row 9 is 6"),
        ({"labels": np.where(np.arange(240) == 9, -1, LABELS)}, "", "row 9 is -1"),
        ({"labels": LABELS[1:]}, "", "labels has 239 entries for 240 items"),
        ({"taus": None}, "", "taus is missing, which 3 experts need"),
        ({"class_counts": None}, "", "class_counts is missing"),
        (
            divided(val_indices=np.arange(120), test_indices=np.arange(119, 239)),
            "",
            "1 items are both validation and test",
        ),
        ({}, "--costs 1.5", "plugin.costs.0 = '1.5'"),
        ({}, "--costs=-0.1", "plugin.costs.0 = '-0.1'"),
        ({}, "--rates 0.1;1", "plugin.rates.1 = '1'"),
        ({}, "--rates nan", "plugin.rates.0 = 'nan'"),
        ({}, "--rates half", "plugin.rates.0 = 'half'"),
        ({}, "--rates=", "plugin.rates and plugin.costs are both empty"),
        ({}, "--groups heads", "plugin.groups is heads, expected head_tail"),
        ({}, "--groups quantile:3", "plugin.groups is quantile:3"),
        ({}, "--groups none.json", "none.json: cannot be read"),
        ({}, "--label-prior unifrom", "did you mean uniform?"),
        ({}, "--posterior single:3", "experts are 0 to 2"),
        ({}, "--posterior product", "plugin.posterior = 'product'"),
        ({}, "--expert-weights 1;2", "expert_weights has 2 numbers for 3 experts"),
        ({}, "--expert-weights gird", "plugin.expert_weights is 'gird', expected equal or grid"),
        ({}, "--objective 1;2;3", "group weights must be 2 positive numbers"),
        ({}, "--objective 1;0", "group weights must be 2 positive numbers"),
        ({}, "--objective worse", "plugin.objective is 'worse', expected balanced or worst"),
        ({}, "--mu-method newton", "'newton' is not one of"),
        ({}, "--mu-method grid --groups class", "a grid over 6 groups"),
        (
            {"logits": np.zeros((240, 17, 6)), "taus": [1.0] * 17},
            "",
            "17 experts are too many",
        ),
        ({}, "--name a/b", "is not a usable name"),
        ({}, "--config x.json", "--config is not an option of moectl balpoe plugin"),
        ({}, "--checkpoint best", "use --run REF@last"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(
    moectl: Call, isolated: Path, arrays: Mapping[str, Any], words: str, message: str
) -> None:
    path = file_of(**arrays)
    outcome = moectl("plugin", "--logits", path, *words.split(), "--quiet", "--out", "new")
    assert message in refused(outcome)
    assert [entry.name for entry in isolated.iterdir()] == [path]


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
def test_missing_input_is_named(moectl: Call, words: str, message: str) -> None:
    Path("text.npz").write_text("no archive")
    assert message in refused(moectl("plugin", *words.split()))


def test_a_folder_that_is_not_empty_is_no_new_run(moectl: Call, run: Path) -> None:
    words = ("plugin", "--logits", file_of(), "--out", "made", *BASE)
    assert "made: exists and is not an empty folder" in refused(moectl(*words))
    assert not (run / "plugins").exists()


@pytest.mark.xfail(strict=True, reason="--out is ignored where a run is read")
def test_a_folder_for_a_plugin_of_a_run_is_refused(moectl: Call, run: Path) -> None:
    assert "--out" in refused(moectl("plugin", "--run", "made", "--out", "new", *BASE))
