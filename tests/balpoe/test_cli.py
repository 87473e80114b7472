import json

import pytest

from moectl.balpoe.cli import _DROPPED
from moectl.cli import _run


@pytest.mark.parametrize("flag", [name for name in _DROPPED if name.startswith("--")])
def test_a_dropped_flag_names_its_successor(flag, capsys):
    assert _run(["balpoe", "train", flag, "x"]) == 2
    assert _DROPPED[flag] in capsys.readouterr().err


def test_the_underscore_spelling_is_accepted(capsys):
    words = [
        "--dataset",
        "synthetic",
        "--save_period",
        "7",
        "--num_experts=3",
        "--mixup_alpha",
        "1",
    ]
    assert _run(["balpoe", "train", *words, "--dry_run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["settings"]
    assert found["train.save_period"] == {"value": 7, "from": "flag"}
    assert found["loss.mixup_alpha"]["value"] == 1.0


def test_a_dry_run_says_where_values_come_from_and_writes_nothing(isolated, capsys):
    words = ["--dataset", "synthetic", "--set", "optim.lr=0.2"]
    assert _run(["balpoe", "train", *words, "-n", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["settings"]["optim.lr"] == {"value": 0.2, "from": "--set"}
    assert document["settings"]["data.dataset"]["from"] == "flag"
    assert document["size"]["parameters"] == 1_344_784
    assert list(isolated.iterdir()) == []


def test_a_dry_run_knows_cifar_without_its_files(capsys):
    assert _run(["balpoe", "train", "-p", "cifar100_ir100", "-n", "--json"]) == 0
    size = json.loads(capsys.readouterr().out)["size"]
    sets = [size[f"{name} images"] for name in ("training", "validation", "test")]
    assert sets == [10_847, 2_000, 8_000]
    assert (size["parameters"], size["updates"]) == (1_362_064, 17_000)


def test_a_dry_run_without_data_shows_the_settings_all_the_same(capsys):
    assert _run(["balpoe", "train", "-p", "imagenet_lt_r50", "-n", "--json"]) == 2
    document = json.loads(capsys.readouterr().out)
    assert document["settings"]["model.arch"]["value"] == "resnet50"
    assert "data" in document["size"]["size unknown"]


def test_missing_data_is_one_sentence_with_the_place(isolated, capsys):
    code = _run(["balpoe", "train", "--no-download", "--data-dir", "nowhere", "--quiet"])
    assert code == 2
    error = capsys.readouterr().err
    assert "nowhere/cifar-100-python" in error
    assert "Traceback" not in error
    assert not (isolated / "nowhere").exists()


def test_evaluating_without_a_run_is_refused(capsys):
    assert _run(["balpoe", "eval"]) == 2
    assert "no finished run of balpoe" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["eval", "plugin", "reject"])
def test_experts_dir_is_another_name_of_run(name, capsys):
    assert _run(["balpoe", name, "--experts_dir", "nosuch"]) == 2
    assert "nosuch: no such run" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["eval", "plugin", "reject"])
def test_options_that_are_gone_name_their_successor(name, capsys):
    assert _run(["balpoe", name, "--save_dir", "results"]) == 2
    assert "results go into the run folder" in capsys.readouterr().err


def test_weights_outside_a_run_are_refused_with_a_way_out(isolated, capsys):
    (isolated / "bare.pth").write_bytes(b"x")
    assert _run(["balpoe", "eval", "--run", "bare.pth"]) == 2
    err = capsys.readouterr().err
    assert "bare.pth: lies outside a run folder" in err
    assert "moectl balpoe --help" in err
