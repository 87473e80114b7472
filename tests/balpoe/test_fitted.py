import copy
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from moectl.balpoe import fitted as module
from moectl.balpoe.fitted import FILE, Fitted, find_plugin, posteriors, read_plugin, to_document
from moectl.balpoe.groups import Groups
from moectl.balpoe.rejection import fit_plugin
from moectl.engine.errors import UserError
from moectl.engine.files import write_json

TABLE = torch.tensor([[[2.0, 1, 0], [1, 1, 1], [0, 0, 3]]])
COUNTS, TAUS = [500, 50, 5], [0.0, 1.0, 2.0]
UNIFORM = torch.full((3,), 1 / 3, dtype=torch.float64)
TRAIN = torch.tensor(COUNTS, dtype=torch.float64) / sum(COUNTS)


# Posteriors


@pytest.mark.parametrize(
    ("kind", "prior", "expected"),
    [
        ("poe", UNIFORM, (0.3213219, 0.2302372, 0.4484409)),
        ("poe", TRAIN, (0.9211417, 0.0660027, 0.0128556)),
        ("mixture", UNIFORM, (0.3856554, 0.2040669, 0.4102777)),
        ("single:0", UNIFORM, (0.054908, 0.201995, 0.743097)),
        ("single:1", UNIFORM, (1 / 3, 1 / 3, 1 / 3)),
        ("single:2", UNIFORM, (0.768725, 0.076872, 0.154403)),
        ("single:0", TRAIN, (0.665241, 0.244728, 0.090031)),
        ("single:1", TRAIN, (0.900901, 0.090090, 0.009009)),
        ("single:2", TRAIN, (0.988134, 0.009881, 0.001985)),
    ],
)
def test_known_posteriors(kind: str, prior: torch.Tensor, expected: tuple[float, ...]) -> None:
    found = posteriors(TABLE, COUNTS, TAUS, prior, kind)
    assert found.dtype == torch.float64
    assert found.tolist() == [pytest.approx(expected, abs=1e-6)]


@pytest.mark.parametrize("kind", ["poe", "mixture", "single:0"])
def test_logits_that_say_nothing_leave_the_prior(kind: str) -> None:
    counts = [3_000_000, 1]
    prior = torch.tensor(counts, dtype=torch.float64) / sum(counts)
    found = posteriors(torch.zeros(1, 1, 2), counts, [1.0], prior, kind)
    assert found[0].tolist() == pytest.approx(prior.tolist(), rel=1e-6)


@pytest.mark.parametrize("kind", ["poe", "mixture", "single:1"])
def test_posteriors_in_chunks_are_those_at_once(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    logits = 3 * torch.randn(50, 3, 3, generator=torch.Generator().manual_seed(0))
    shares = torch.tensor([0.2, 0.5, 0.3])
    whole = posteriors(logits, COUNTS, TAUS, TRAIN, kind, shares)
    monkeypatch.setattr(module, "_CHUNK", 7)
    torch.testing.assert_close(
        posteriors(logits, COUNTS, TAUS, TRAIN, kind, shares), whole, rtol=1e-12, atol=0
    )


def test_an_expert_of_weight_0_is_not_heard() -> None:
    other = TABLE.clone()
    other[:, 2] = 100 * torch.randn(1, 3, generator=torch.Generator().manual_seed(1))
    shares = torch.tensor([0.4, 0.6, 0.0])
    for kind in ("poe", "mixture"):
        one, two = (posteriors(z, COUNTS, TAUS, UNIFORM, kind, shares) for z in (TABLE, other))
        torch.testing.assert_close(one, two)


def test_a_class_that_the_prior_excludes_has_no_probability() -> None:
    prior = torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64)
    for kind in ("poe", "mixture", "single:0"):
        found = posteriors(TABLE, COUNTS, TAUS, prior, kind)
        assert found[0, 2] == 0
        assert float(found.sum()) == pytest.approx(1)


# The document


def fitted(kind: str = "poe") -> Fitted:
    """A plug-in for four classes, three experts, two rates and a cost."""
    draws = torch.Generator().manual_seed(3)
    counts, prior = [60, 30, 7, 3], torch.tensor([0.6, 0.3, 0.07, 0.03], dtype=torch.float64)
    logits = 2 * torch.randn(80, 3, 4, generator=draws)
    labels = torch.arange(80) % 4
    shares = [0.2, 0.6, 0.2]
    judged = posteriors(logits, counts, TAUS, prior, kind, torch.tensor(shares))
    groups = Groups(("head", "tail"), (0, 0, 1, 1))
    plugin = fit_plugin(judged, labels, groups, rates=(0.0, 0.3), costs=(0.4,))
    return Fitted(
        plugin=plugin,
        posterior=kind,
        expert_weights=shares,
        prior=prior,
        class_counts=counts,
        class_names=["a", "b", "c", "d"],
        taus=TAUS,
        weights={"file": "model_best.pth", "sha256": "0" * 64, "epoch": 3},
        config={
            "objective": "balanced",
            "mu_method": "fixed-point",
            "label_prior": "train",
            "seed": 1,
        },
    )


@pytest.mark.parametrize("kind", ["poe", "mixture", "single:2"])
def test_a_plugin_read_back_decides_the_same(tmp_path: Path, kind: str) -> None:
    original = fitted(kind)
    write_json(tmp_path / FILE, to_document(original))
    again = read_plugin(tmp_path / FILE)
    logits = 4 * torch.randn(500, 3, 4, generator=torch.Generator().manual_seed(4))
    for point in ({"rate": 0.0}, {"rate": 0.3}, {"cost": 0.4}):
        one = original.plugin.predict(original.posteriors(logits), **point)
        two = again.plugin.predict(again.posteriors(logits), **point)
        for left, right in zip(one, two, strict=True):
            assert torch.equal(left, right)
    assert again.plugin.groups == original.plugin.groups
    assert (again.class_names, again.weights) == (original.class_names, original.weights)
    assert torch.equal(again.plugin.errors, original.plugin.errors)


def test_reading_and_writing_again_changes_nothing_but_the_trace() -> None:
    document = to_document(fitted())
    Path(FILE).write_text(json.dumps(document))
    again = to_document(read_plugin(Path(FILE)))
    for point in (*document["points"], *again["points"]):
        point["trace"] = {}
    assert again == document


def test_a_threshold_below_every_score_is_null() -> None:
    points = to_document(fitted())["points"]
    assert points[0]["rejection_threshold"] is None
    assert points[0]["rejection"] == pytest.approx(0)
    assert all(math.isfinite(point["rejection_threshold"]) for point in points[1:])
    assert points[2]["rejection_threshold"] == -0.4


def test_the_document_has_the_keys_of_the_original_program() -> None:
    document = to_document(fitted())
    wanted = {"lambda_0", "alpha", "group_weights", "rejection_threshold", "balanced_error"}
    for point in document["points"]:
        assert wanted | {"worst_group_error", "mu", "rate", "cost", "trace"} <= set(point)
        assert point["lambda_0"] == point["mu"][1] - point["mu"][0]
        assert point["balanced_error"] == pytest.approx(sum(point["group_errors"]) / 2)
        assert point["worst_group_error"] == max(point["group_errors"])
        steps = {len(values) for values in point["trace"].values()}
        assert steps == {30}, "alpha, mu, errors and objective of every iteration"
    assert {"expert_weights", "tau_list", "label_prior", "groups", "config"} <= set(document)


# Damaged files


DOCUMENT = to_document(fitted())


def with_points(name: str, value: Any) -> dict[str, Any]:
    """Change something in every point."""
    document = copy.deepcopy(DOCUMENT)
    for point in document["points"]:
        point[name] = value
    return document


def without_in_points(name: str) -> dict[str, Any]:
    document = copy.deepcopy(DOCUMENT)
    for point in document["points"]:
        del point[name]
    return document


def groups_of(*of_class: Any) -> dict[str, Any]:
    return DOCUMENT | {"groups": {"names": ["head", "tail"], "of_class": list(of_class)}}


def refused(text: str) -> str:
    path = Path("damaged.json")
    path.write_text(text)
    with pytest.raises(UserError) as refusal:
        read_plugin(path)
    message = refusal.value.message
    assert message.startswith("damaged.json: ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize("text", ["", "{", "not JSON", "\x00"])
def test_what_is_no_json_is_refused(text: str) -> None:
    assert "not valid JSON" in refused(text)


def test_what_is_no_text_is_refused() -> None:
    Path("damaged.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"damaged\.json: not UTF-8"):
        read_plugin(Path("damaged.json"))


def test_a_missing_file_is_refused() -> None:
    with pytest.raises(UserError, match=r"none\.json: cannot be read"):
        read_plugin(Path("none.json"))


@pytest.mark.parametrize("document", [[], [DOCUMENT], 3, "text", None, {}, {"points": []}])
def test_another_kind_of_document_is_refused(document: Any) -> None:
    assert "not a plug-in" in refused(json.dumps(document))


@pytest.mark.parametrize(
    "name",
    [
        "points", "groups", "posterior", "expert_weights", "tau_list", "label_prior",
        "class_counts", "class_names", "checkpoint", "config",
    ],
)  # fmt: skip
def test_a_missing_key_is_named(name: str) -> None:
    document = {key: value for key, value in DOCUMENT.items() if key != name}
    assert f"no '{name}'" in refused(json.dumps(document))


@pytest.mark.parametrize(
    "name",
    [
        "rate", "cost", "alpha", "mu", "rejection_threshold", "group_weights", "rejection",
        "group_errors",
    ],
)  # fmt: skip
def test_a_missing_key_of_a_point_is_named(name: str) -> None:
    assert f"no '{name}'" in refused(json.dumps(without_in_points(name)))


@pytest.mark.parametrize(
    "document",
    [
        DOCUMENT | {"points": {}},
        DOCUMENT | {"points": []},
        DOCUMENT | {"points": [1, 2]},
        DOCUMENT | {"points": "text"},
        DOCUMENT | {"groups": ["head", "tail"]},
        DOCUMENT | {"label_prior": ["a", "b", "c", "d"]},
        DOCUMENT | {"label_prior": None},
        with_points("alpha", "x"),
        with_points("alpha", None),
        with_points("alpha", [0.5]),
        with_points("alpha", [0.5, 0.5, 0.5]),
        with_points("alpha", 0.5),
        with_points("mu", ["x", "y"]),
        with_points("rejection_threshold", "low"),
        with_points("group_errors", [None, None]),
    ],
)
def test_damage_is_refused(document: Any) -> None:
    assert "not a plug-in" in refused(json.dumps(document))


@pytest.mark.parametrize(
    "document",
    [
        with_points("rate", "0.3"),
        with_points("cost", "0.3"),
        with_points("alpha", [0.5, 0.0]),
        with_points("alpha", [0.5, math.nan]),
        with_points("mu", [1.0]),
        with_points("mu", [math.nan, 1.0]),
        with_points("rejection_threshold", math.nan),
        with_points("group_weights", [0.5]),
        with_points("rejection", [1]),
        groups_of(0, 1),
        groups_of(0, 0, 1, 2),
        groups_of(0, 0, 0, 0),
        groups_of("a", "b", "c", "d"),
        DOCUMENT | {"label_prior": [0.5, 0.5]},
        DOCUMENT | {"expert_weights": [0.5, 0.5]},
        DOCUMENT | {"expert_weights": "equal"},
        DOCUMENT | {"expert_weights": None},
        DOCUMENT | {"tau_list": ["a", "b", "c"]},
        DOCUMENT | {"tau_list": None},
        DOCUMENT | {"class_counts": ["a", "b", "c", "d"]},
        DOCUMENT | {"class_counts": None},
        DOCUMENT | {"class_names": ["a"]},
        DOCUMENT | {"class_names": None},
        DOCUMENT | {"posterior": ["poe"]},
        DOCUMENT | {"posterior": "prod"},
        DOCUMENT | {"posterior": "single:3"},
        DOCUMENT | {"checkpoint": None},
        DOCUMENT | {"checkpoint": {}},
        DOCUMENT | {"checkpoint": {**DOCUMENT["checkpoint"], "file": "../../other.pth"}},
        DOCUMENT | {"config": None},
        DOCUMENT | {"config": []},
        DOCUMENT | {"config": {}},
        DOCUMENT | {"config": {"seed": "one"}},
        DOCUMENT | {"config": {"seed": 1, "unknown": 2}},
        DOCUMENT | {"config": {"seed": 1, "rates": [2]}},
    ],
)
def test_parts_that_do_not_fit_together_are_refused(document: Any) -> None:
    assert "not a plug-in" in refused(json.dumps(document))


# Finding


@pytest.fixture
def run() -> Path:
    """A run with two plug-ins, of which `first` was written last."""
    folder = Path("run")
    for age, name in enumerate(("first", "second")):
        place = folder / "plugins" / name
        place.mkdir(parents=True)
        (place / FILE).write_text("{}")
        os.utime(place / FILE, ns=(10**18 - age, 10**18 - age))
    return folder


def test_a_plugin_is_found_by_path_and_by_name(run: Path) -> None:
    second = run / "plugins" / "second" / FILE
    assert find_plugin(run, "second") == second
    assert find_plugin(run, str(second)) == second
    assert find_plugin(None, str(second)) == second


def test_the_newest_plugin_is_meant_without_a_name(run: Path) -> None:
    assert find_plugin(run, "") == run / "plugins" / "first" / FILE


def test_an_unknown_name_proposes_the_nearest(run: Path) -> None:
    with pytest.raises(UserError, match="run: no plug-in secnd; did you mean second"):
        find_plugin(run, "secnd")


@pytest.mark.parametrize("name", ["n" * 300, "no/such/file.json", ".", "plugins"])
def test_names_of_nothing_are_refused(run: Path, name: str) -> None:
    with pytest.raises(UserError, match="no plug-in") as refusal:
        find_plugin(run, name)
    assert "moectl balpoe plugin" in refusal.value.hint


def test_a_run_without_plugins_is_refused() -> None:
    Path("empty").mkdir()
    with pytest.raises(UserError, match="empty: no plug-in yet"):
        find_plugin(Path("empty"), "")
    with pytest.raises(UserError, match="no plug-in moe"):
        find_plugin(None, "moe")
