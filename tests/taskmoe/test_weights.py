"""Weights of specialists and mixtures, ours and bare ones."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moectl.common.images import normalise
from moectl.engine import artefact
from moectl.engine.errors import UserError
from moectl.engine.settings import resolve
from moectl.taskmoe.model import MergedMoE, Specialist
from moectl.taskmoe.settings import TaskmoeSettings
from moectl.taskmoe.weights import (
    Member,
    change_of,
    load_state,
    read_mixture,
    read_specialist,
    rebuild,
)

State = dict[str, Tensor]

GIVEN = ((0.5, 0.25, 0.3), (0.25, 0.5, 0.3))
WANTED = ((0.25, 0.25, 0.1), (0.5, 0.25, 0.2))
BYTES = torch.randint(0, 256, (6, 3, 16, 16), generator=torch.Generator().manual_seed(0)).byte()
IMAGES = normalise(BYTES, *WANTED)


def settings(task: str = "digits") -> TaskmoeSettings:
    return resolve(TaskmoeSettings, {"data.task": task, "model.width": 4}, [], [])[0]


def lively(model: nn.Module) -> nn.Module:
    """Give every entry of batch norm a value that matters."""
    for name, value in model.state_dict().items():
        if name.endswith(("running_mean", "bn.bias")):
            value.normal_(std=0.2)
        elif name.endswith(("running_var", "bn.weight")):
            value.uniform_(0.5, 1.5)
    return model.eval()


def specialist(classes: int = 3, width: int = 4) -> Specialist:
    torch.manual_seed(0)
    model = lively(Specialist(classes, width))
    assert isinstance(model, Specialist)
    return model


def mixture(**arguments: Any) -> MergedMoE:
    torch.manual_seed(1)
    given = {"classes": 9, "width": 4, "gating_feature_dim": 16, **arguments}
    model = lively(MergedMoE(**given))
    assert isinstance(model, MergedMoE)
    return model


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


class Evil:
    """Leaves a file behind when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (Path("touched"),)


# How one normalisation becomes another


def test_factor_and_addend_are_the_known_ones() -> None:
    factor, addend = change_of(GIVEN, WANTED)
    torch.testing.assert_close(factor, torch.tensor([0.5, 2.0, 1.5]))
    torch.testing.assert_close(addend, torch.tensor([0.5, 0.0, 1.0]))


def test_the_same_statistics_change_nothing() -> None:
    factor, addend = change_of(WANTED, WANTED)
    assert factor.tolist() == [1, 1, 1]
    assert addend.tolist() == [0, 0, 0]


def test_a_member_sees_images_as_it_was_trained_on_them() -> None:
    model = specialist()
    member = Member(Path("a.pth"), "", model, [0, 1, 2], WANTED)
    with torch.no_grad():
        asked = member.asking(GIVEN, torch.device("cpu"))(normalise(BYTES, *GIVEN))
        assert not torch.allclose(asked, model(normalise(BYTES, *GIVEN)), atol=1e-4)
        torch.testing.assert_close(asked, model(IMAGES), rtol=0, atol=1e-5)


# Specialists


def test_our_specialist_comes_with_its_classes_and_statistics(runs: Path) -> None:
    path = runs / "s2" / "best_model.pth"
    member, stored = read_specialist(path, settings(), 2), artefact.load(path)
    assert member.class_ids == [3, 4, 5]
    assert [list(part) for part in member.statistics] == [stored.facts["mean"], stored.facts["std"]]
    assert (member.path, member.sha256) == (path, stored.facts["sha256"])
    assert not member.model.training
    for name, value in member.model.state_dict().items():
        assert torch.equal(value, stored.payload["model_state_dict"][name]), name


FORMS: dict[str, Callable[[State], Any]] = {
    "bare": lambda state: state,
    "beside other things": lambda state: {"model_state_dict": state, "epoch": 3, "accuracy": 80.1},
    "parallel": lambda state: {f"module.{name}": value for name, value in state.items()},
}


@pytest.mark.parametrize("form", FORMS)
def test_a_public_specialist_gets_classes_and_statistics_of_its_task(
    tmp_path: Path, runs: Path, form: str
) -> None:
    model = specialist()
    path = saved(tmp_path / "data3_99.00_epoch4.pth", FORMS[form](model.state_dict()))
    member = read_specialist(path, settings(), 3)
    ours = artefact.load(runs / "s3" / "best_model.pth").facts  # trained with the same seed
    assert member.class_ids == [6, 7, 8]
    assert [list(part) for part in member.statistics] == [ours["mean"], ours["std"]]
    with torch.no_grad():
        assert torch.equal(member.model(IMAGES), model(IMAGES))


@pytest.mark.parametrize(
    ("file", "task", "number", "message"),
    [
        ("s2", "digits", 1, "is specialist 2 of task digits, expected specialist 1 of task digits"),
        (
            "s1",
            "digits_overlap",
            1,
            "is specialist 1 of task digits, expected specialist 1 of .*ap",
        ),
        ("t", "digits", 1, "is MergedMoE of task digits, expected specialist 1 of task digits"),
    ],
)
def test_another_specialist_is_refused(
    runs: Path, file: str, task: str, number: int, message: str
) -> None:
    with pytest.raises(UserError, match=rf"{file}/best_model\.pth: {message}$"):
        read_specialist(runs / file / "best_model.pth", settings(task), number)


def without(state: State, name: str) -> State:
    return {key: value for key, value in state.items() if key != name}


DAMAGED: dict[str, tuple[Callable[[State], Any], str]] = {
    "missing": (
        lambda state: without(state, "conv2.conv.weight"),
        r"lacks conv2\.conv\.weight of a Specialist",
    ),
    "no classifier": (
        lambda state: without(state, "classifier.3.weight"),
        r"lacks classifier\.3\.weight",
    ),
    "a number for weights": (
        lambda state: {**state, "conv1.conv.weight": torch.tensor(1.0)},
        r"conv1\.conv\.weight has shape \(\), expected 4 axes",
    ),
    "not finite": (
        lambda state: {
            **state,
            "conv2.bn.bias": torch.full_like(state["conv2.bn.bias"], torch.nan),
        },
        r"conv2\.bn\.bias is not finite",
    ),
    "unknown": (
        lambda state: {**state, "extra.weight": torch.zeros(1)},
        r"has an unknown extra\.weight of a Specialist",
    ),
    "shape": (
        lambda state: {**state, "conv2.bn.bias": torch.zeros(5)},
        r"conv2\.bn\.bias has shape \(5,\), expected \(32,\)",
    ),
    "classes": (
        lambda _: specialist(classes=4).state_dict(),
        "tells 4 classes apart, specialist 1 knows 3",
    ),
    "no weights": (lambda _: {"epoch": 3}, "holds no weights"),
    "list of weights": (lambda _: {"model_state_dict": [torch.zeros(1)]}, "holds no weights"),
    "tensor": (lambda _: torch.zeros(3), "holds a Tensor, expected a dictionary"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_what_is_wrong_with_a_specialist_is_said_with_file_and_entry(
    tmp_path: Path, damage: str
) -> None:
    change, message = DAMAGED[damage]
    path = saved(tmp_path / "damaged.pth", change(specialist().state_dict()))
    with pytest.raises(UserError, match=rf"^\S*/damaged\.pth: {message}"):
        read_specialist(path, settings(), 1)


# Mixtures


def test_our_mixture_is_read_as_it_was_written(runs: Path) -> None:
    path = runs / "m" / "merged_model.pth"
    weights, stored = read_mixture(path, settings()), artefact.load(path)
    assert weights.facts == stored.facts
    assert weights.payload.keys() == stored.payload.keys()


@pytest.mark.parametrize("file", ["m/merged_model.pth", "t/best_model.pth"])
def test_our_mixture_tells_of_itself_without_its_sidecar(
    runs: Path, tmp_path: Path, file: str
) -> None:
    stored = artefact.load(runs / file)
    alone = read_mixture(Path(shutil.copy(runs / file, tmp_path)), settings())
    of_the_sidecar = {"run", "file", "bytes", "sha256"}
    for name in stored.facts.keys() - of_the_sidecar:
        assert alone.facts[name] == stored.facts[name], name
    assert alone.sha256 == stored.sha256
    with torch.no_grad():
        assert torch.equal(rebuild(alone)(IMAGES).logits, rebuild(stored)(IMAGES).logits)


def test_a_specialist_is_no_mixture(runs: Path) -> None:
    with pytest.raises(UserError, match="is specialist 1 of task digits, expected a mixture"):
        read_mixture(runs / "s1" / "best_model.pth", settings())


def public(model: MergedMoE) -> State:
    """Name the weights as in the public files, which hold no temperature."""
    state = without(model.state_dict(), "temperature")
    if model.combine == "features":
        return state
    return {
        name.replace(".gate_net.", ".net.").replace("heads.", "classifiers."): value
        for name, value in state.items()
    }


@pytest.mark.parametrize(
    "arguments",
    [
        {"combine": "features", "gating_feature_dim": 16},
        {"combine": "features", "gating_feature_dim": 0},
        {"combine": "features", "gating_feature_dim": 40, "width": 6},
        {"combine": "logits"},
    ],
)
def test_the_form_of_a_public_mixture_is_read_off_its_weights(
    tmp_path: Path, arguments: dict[str, Any]
) -> None:
    model = mixture(**arguments)
    path = saved(tmp_path / "best_model_74.13_epoch41.pth", {"model_state_dict": public(model)})
    weights = read_mixture(path, settings())
    expected = {"classes": 9, "num_experts": 3, "width": 4, **arguments}
    assert weights.facts["arguments"] == expected
    with torch.no_grad():
        ours, theirs = rebuild(weights)(IMAGES), model(IMAGES)
    assert torch.equal(ours.logits, theirs.logits)
    assert torch.equal(ours.gates, theirs.gates)


def test_a_public_mixture_gets_the_facts_of_the_task(tmp_path: Path) -> None:
    parallel = {f"module.{name}": value for name, value in public(mixture()).items()}
    content = {"model_state_dict": parallel, "epoch": 41, "accuracy": 74.13}
    facts = read_mixture(saved(tmp_path / "a.pth", content), settings()).facts
    assert facts["class_names"] == list("012345678")
    assert facts["class_ids"] == list(range(9))
    assert facts["owners"] == [[1, 0, 0]] * 3 + [[0, 1, 0]] * 3 + [[0, 0, 1]] * 3
    assert (facts["task"], facts["label_map"]) == ("digits", "global")
    assert (facts["epoch"], facts["image_size"]) == (41, 16)
    assert facts["mean"] is None
    assert facts["std"] is None


def test_statistics_in_a_public_file_are_kept(tmp_path: Path) -> None:
    content = {"model_state_dict": public(mixture()), "mean": [0.1] * 3, "std": [0.2] * 3}
    facts = read_mixture(saved(tmp_path / "a.pth", content), settings()).facts
    assert (facts["mean"], facts["std"]) == ([0.1] * 3, [0.2] * 3)


def test_a_public_file_without_temperature_gets_2_and_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = read_mixture(saved(tmp_path / "a.pth", public(mixture())), settings())
    assert weights.facts["temperature"] == 2
    assert rebuild(weights).temperature == 2
    assert f"{tmp_path}/a.pth: holds no temperature; 2 is taken" in caplog.text


def test_a_temperature_in_the_file_is_kept_without_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = saved(tmp_path / "a.pth", mixture(temperature=0.5).state_dict())
    weights = read_mixture(path, settings())
    assert weights.facts["temperature"] == 0.5
    assert rebuild(weights).temperature == 0.5
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ({"classes": 10}, "10 classes and 3 experts"),
        ({"num_experts": 2}, "9 classes and 2 experts"),
    ],
)
@pytest.mark.parametrize("combine", ["features", "logits"])
def test_classes_and_experts_must_be_those_of_the_task(
    tmp_path: Path, arguments: dict[str, Any], found: str, combine: str
) -> None:
    path = saved(tmp_path / "a.pth", public(mixture(combine=combine, **arguments)))
    message = rf"a\.pth: has {found}, task digits has 9 classes and 3 specialists"
    with pytest.raises(UserError, match=message):
        read_mixture(path, settings())


@pytest.mark.parametrize(
    "name",
    [
        "classifier.weight",
        "feature_extractor.0.conv.weight",
        "experts.1.2.weight",
        "gating_network.gate_net.4.bias",
    ],
)
def test_a_missing_entry_of_a_mixture_is_named(tmp_path: Path, name: str) -> None:
    path = saved(tmp_path / "a.pth", without(public(mixture()), name))
    with pytest.raises(UserError, match=rf"a\.pth: lacks {name}"):
        read_mixture(path, settings())


@pytest.mark.parametrize(
    "read",
    [read_mixture, lambda path, settings: read_specialist(path, settings, 1)],
    ids=["mixture", "specialist"],
)
def test_files_that_would_run_code_are_not_read(tmp_path: Path, read: Callable[..., Any]) -> None:
    path = saved(tmp_path / "evil.pth", {"model_state_dict": {}, "more": Evil()})
    with pytest.raises(UserError, match=r"evil\.pth: holds more than tensors and plain types"):
        read(path, settings())
    assert not Path("touched").exists()


@pytest.mark.parametrize("combine", ["features", "logits"])
def test_a_mixture_read_back_says_the_same_bit_for_bit(tmp_path: Path, combine: str) -> None:
    model = mixture(combine=combine, temperature=0.37)
    arguments = {"classes": 9, "width": 4, "gating_feature_dim": 16, "combine": combine}
    facts = {"model": "MergedMoE", "arguments": arguments}
    artefact.save(tmp_path / "a.pth", {"model_state_dict": model.state_dict()}, facts)
    found = rebuild(read_mixture(tmp_path / "a.pth", settings()))
    assert not found.training
    assert torch.equal(found.temperature, model.temperature)
    with torch.no_grad():
        for ours, theirs in zip(found(IMAGES), model(IMAGES), strict=True):
            assert torch.equal(ours, theirs)


def test_weights_of_another_form_than_the_facts_say_are_refused(runs: Path) -> None:
    weights = read_mixture(runs / "m" / "merged_model.pth", settings())
    facts = {**weights.facts, "arguments": {**weights.facts["arguments"], "width": 8}}
    message = (
        r"feature_extractor\.0\.conv\.weight has shape \(4, 3, 3, 3\), expected \(8, 3, 3, 3\)"
    )
    with pytest.raises(UserError, match=rf"merged_model\.pth: {message}"):
        rebuild(replace(weights, facts=facts))


# Loading


def test_weights_are_loaded_whole() -> None:
    torch.manual_seed(5)
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    load_state(model, other.state_dict(), Path("a.pth"))
    assert torch.equal(model.weight, other.weight)
    assert torch.equal(model.bias, other.bias)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"weight": torch.zeros(2, 2)}, r"lacks bias of a Linear"),
        (
            {"weight": torch.zeros(2, 2), "bias": torch.zeros(2), "scale": torch.zeros(1)},
            "has an unknown scale of a Linear",
        ),
        (
            {"weight": torch.zeros(2, 3), "bias": torch.zeros(2)},
            r"weight has shape \(2, 3\), expected \(2, 2\)",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused_and_none_is_loaded(state: State, message: str) -> None:
    model = nn.Linear(2, 2)
    before = model.weight.detach().clone()
    with pytest.raises(UserError, match=rf"^a\.pth: {message}$"):
        load_state(model, state, Path("a.pth"))
    assert torch.equal(model.weight, before)
