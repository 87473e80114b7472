import json
import logging
from collections.abc import Callable, Sequence
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
    assert found.posterior == kind
    assert found.expert_weights == pytest.approx([1 / 3] * 3)
    listed = fit(noisy, section(posterior=kind, expert_weights=[1, 1, 2]), 3)
    assert listed.expert_weights == [0.25, 0.25, 0.5]
    assert torch.equal(listed.plugin.alpha, found.plugin.alpha) == (kind == "single:0")


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


@pytest.mark.parametrize("experts", [9, 16])
def test_a_grid_over_many_experts_is_refused(experts: int) -> None:
    many = outputs([1.0] * experts)
    with pytest.raises(UserError, match=f"too large for {experts} experts") as refusal:
        fit(many, section(expert_weights="grid"), 0)
    assert "equal" in refusal.value.hint
    alone = fit(many, section(expert_weights="grid", posterior="single:1"), 0)
    assert alone.expert_weights == pytest.approx([1 / experts] * experts)


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


def file_of(path: str = "outputs.npz", **changes: Any) -> str:
    """Write logits of all items; None leaves an array out."""
    logits, labels = sample()
    arrays: dict[str, Any] = {"logits": logits, "labels": labels, "class_names": np.array(NAMES)}
    arrays |= {"class_counts": COUNTS, "taus": TAUS, **changes}
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


@pytest.mark.parametrize("option", ["--run", "--experts-dir", "--experts_dir"])
def test_a_plugin_of_a_run_is_kept_in_it(balpoe: Call, run: Path, option: str) -> None:
    code, out, err = balpoe("plugin", option, "made", "--rates", "0.1;0.3")
    assert code == 0
    assert [line.partition(":")[0] for line in err.splitlines()] == ["rate 0.1", "rate 0.3"]
    assert out == f"made/plugins/plugin/{FILE}\n"
    document = document_of(out.strip())
    assert document["checkpoint"] == {"file": LOGITS, "sha256": "a" * 64, "epoch": 0}
    assert [point["rate"] for point in document["points"]] == [0.1, 0.3]
    assert document["class_names"] == NAMES
    expected = fit(OUTPUTS, PluginSection(rates=(0.1, 0.3)), 1).plugin
    assert torch.equal(read_plugin(Path(out.strip())).plugin.alpha, expected.alpha)
    assert "## Rejection rule `plugin`" in (run / "report.md").read_text()


def test_the_result_as_json_is_the_document(balpoe: Call, run: Path) -> None:
    code, out, _ = balpoe("plugin", "--run", "made", "--json", *BASE)
    assert code == 0
    document = json.loads(out)
    place = document.pop("file")
    assert document == document_of(place)


def test_the_same_fit_again_is_the_same_file(balpoe: Call, run: Path) -> None:
    place = Path(balpoe("plugin", "--run", "made", *BASE)[1].strip())
    before = place.read_bytes()
    for words in (BASE, (*BASE, "--logits", f"made/{LOGITS}")):
        assert balpoe("plugin", "--run", "made", *words)[1].strip() == str(place)
        assert place.read_bytes() == before
    assert len(list(run.glob("plugins/*"))) == 1


def test_another_fit_of_the_same_name_gets_a_number(balpoe: Call, run: Path) -> None:
    name = ("--run", "made", "--name", "moe")
    first = Path(balpoe("plugin", *name, *BASE)[1].strip())
    before = first.read_bytes()
    second = balpoe("plugin", *name, *BASE, "--objective", "worst")[1].strip()
    third = balpoe("plugin", *name, *BASE, "--label-prior", "uniform")[1].strip()
    again = balpoe("plugin", *name, *BASE, "--objective", "worst")[1].strip()
    places = [Path(place).parent.name for place in (first, second, third, again)]
    assert places == ["moe", "moe-2", "moe-3", "moe-2"]
    assert first.read_bytes() == before
    assert document_of(second)["objective"] == "worst"


def test_other_contents_of_a_groups_file_are_another_fit(balpoe: Call, run: Path) -> None:
    words = ("plugin", "--run", "made", "--groups", "g.json", *BASE)
    write_json(Path("g.json"), {"one": [0, 1, 2], "two": [3, 4, 5]})
    first = balpoe(*words)[1]
    write_json(Path("g.json"), {"one": [0, 2, 4], "two": [1, 3, 5]})
    assert balpoe(*words)[1] != first


def test_logits_of_any_classifier_become_a_run(balpoe: Call, parsed: Callable[[Path], Any]) -> None:
    path = file_of()
    digest = sha256(Path(path).read_bytes())
    code, out, _ = balpoe("plugin", "--logits", path, *BASE, "--name", "theirs")
    assert code == 0
    folder = Path(out.strip()).parents[2]
    assert folder.parent == Path("runs/balpoe")
    assert folder.name.startswith("theirs-")
    record = document_of(folder / "run.json")
    assert record["parents"] == [{"path": path, "sha256": digest}]
    assert (record["status"], record["command"]) == ("finished", "plugin")
    page = parsed(folder / "report.html")
    assert digest in page.words
    assert "Rejection rule theirs" in page.words
    kept, given = read_outputs(folder / LOGITS, 0.5, 0), read_outputs(Path(path), 0.2, 1)
    assert kept.weights == digest
    assert torch.equal(kept.val_logits, given.val_logits)
    assert torch.equal(kept.test_labels, given.test_labels)
    assert kept.test_indices == given.test_indices
    assert document_of(out.strip())["checkpoint"]["sha256"] == digest


def test_a_run_of_logits_is_a_run_like_others(
    balpoe: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plot, "write_png", lambda _, path: path.write_bytes(b""))
    first = balpoe("plugin", "--logits", file_of(), "--out", "theirs", *BASE)[1].strip()
    assert first == f"theirs/plugins/plugin/{FILE}"
    before = document_of(first)
    assert balpoe("plugin", "--run", "theirs", *BASE)[:2] == (0, f"{first}\n")
    assert document_of(first) == before
    code, out, _ = balpoe("eval", "--run", "theirs", "--no-rejection", "--json", "--quiet")
    found = json.loads(out)
    assert (code, found["weights"], found["images"]) == (0, before["checkpoint"], 192)
    assert Path("theirs/evals/test@logits.json").is_file()
    code, out, _ = balpoe("reject", "--run", "theirs", "--target-rate", "0.3", "--quiet")
    assert code == 0
    assert len(out.splitlines()) == 192


def test_logits_may_be_probabilities_of_one_classifier(balpoe: Call) -> None:
    logits, _ = sample()
    exact = np.exp(logits[:, 0] - logits[:, 0].max(1, keepdims=True))
    exact /= exact.sum(1, keepdims=True)
    one = file_of("one.npz", logits=logits[:, 0], taus=None)
    two = file_of("two.npz", logits=None, posteriors=exact, taus=None)
    fits = [
        document_of(balpoe("plugin", "--logits", path, *BASE)[1].strip()) for path in (one, two)
    ]
    for left, right in zip(*(document["points"] for document in fits), strict=True):
        assert left["alpha"] == pytest.approx(right["alpha"], rel=1e-4)
        assert left["group_errors"] == pytest.approx(right["group_errors"])


def test_the_division_of_a_file_follows_the_settings(balpoe: Call) -> None:
    words = ("--set", "data.val_fraction=0.5", "--set", "train.seed=4")
    out = balpoe("plugin", "--logits", file_of(), *BASE, *words)[1].strip()
    kept = read_outputs(Path(out).parents[2] / LOGITS, 0.2, 1)
    given = read_outputs(Path("outputs.npz"), 0.5, 4)
    assert kept.val_indices == given.val_indices
    assert document_of(out)["config"]["seed"] == 4


def test_the_settings_of_a_run_of_logits_describe_the_classifier(balpoe: Call) -> None:
    arrays: dict[str, Any] = {"logits": sample((0.0, 1.5))[0], "taus": (0.0, 1.5)}
    balpoe("plugin", "--logits", file_of(**arrays), "--out", "theirs", *BASE)
    settings = from_toml(BalpoeSettings, Path("theirs/settings.toml"))
    assert (settings.model.experts, settings.taus) == (2, (0.0, 1.5))
    assert settings.plugin.rates == (0.1, 0.3)
    assert settings.data.dataset == "list"
