import csv
import json
import shutil
from pathlib import Path

import pytest
import torch

from moectl.balpoe.data import load
from moectl.balpoe.settings import BalpoeSettings
from moectl.balpoe.train import _facts, build, facts_of, size
from moectl.cli import _run
from moectl.engine.errors import UserError
from moectl.engine.settings import resolve

DATA = ["--dataset", "synthetic", "--imbalance-ratio", "10", "--set", "data.image_size=8"]
SHAPE = [
    *DATA, "--layer2-dimension", "16", "--layer3-dimension", "16", "--experts", "2",
    "--tau-list", "0;2", "--set", "train.precision=no",
]  # fmt: skip
SMALL = [
    *SHAPE, "--save-period", "2", "--bs", "64", "--warmup", "0", "--quiet",
    "--set", "train.tensorboard=false",
]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One small run that several tests read."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        assert _run(["balpoe", "train", *SMALL, "--epochs", "3", "--out", str(folder)]) == 0
    return folder


def settings_of(*assignments: str) -> BalpoeSettings:
    small = ["data.dataset=synthetic", "data.imbalance_ratio=10", *assignments]
    return resolve(BalpoeSettings, {}, small, [])[0]


def test_a_run_leaves_the_files_of_the_document(trained):
    names = {path.name for path in trained.iterdir()}
    assert {"config.json", "class_counts.json", "split.json", "summary.json"} <= names
    assert {"checkpoint-epoch2.pth", "checkpoint-epoch3.pth", "model_best.pth"} <= names
    assert {"settings.toml", "run.json", "metrics.csv", "log.txt", "report.md"} <= names
    assert not (trained / "rehearsal").exists()
    assert not list(trained.glob(".*.part"))


def test_the_weights_file_holds_plain_types_under_the_documents_keys(trained):
    payload = torch.load(trained / "checkpoint-epoch3.pth", weights_only=True)
    expected = {"arch", "epoch", "state_dict", "optimizer", "monitor_best", "config", "criterion"}
    assert expected | {"class_counts", "format_version"} == set(payload)
    assert payload["epoch"] == 3
    assert "backbone.layer3s.1.4.conv2.weight" in payload["state_dict"]
    assert payload["config"]["loss"]["tau_list"] == "0;2"
    sidecar = json.loads((trained / "checkpoint-epoch3.pth.json").read_text())
    assert sidecar["arguments"]["experts"] == 2
    assert sidecar["taus"] == [0.0, 2.0]


def test_metrics_hold_the_loss_of_every_expert_each_epoch(trained):
    with (trained / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["val/balanced_accuracy"]]
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    for row in rows:
        experts = [float(row[f"train/loss_expert_{number}"]) for number in range(2)]
        assert float(row["train/loss"]) == pytest.approx(sum(experts) / 2, rel=1e-6)
        assert 0 <= float(row["train/mixing_weight"]) <= 1


def test_training_lowers_the_loss(trained):
    with (trained / "metrics.csv").open() as file:
        losses = [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert losses[-1] < 0.7 * losses[0]


def test_the_split_is_stratified_and_disjoint(trained):
    split = json.loads((trained / "split.json").read_text())
    assert not set(split["val"]) & set(split["test"])
    assert len(split["val"]) == 80
    assert len(split["test"]) == 320


def test_evaluating_again_gives_what_training_found(trained, capsys):
    assert _run(["balpoe", "eval", "--run", str(trained), "--json", "--no-rejection"]) == 0
    document = json.loads(capsys.readouterr().out)
    summary = json.loads((trained / "summary.json").read_text())
    assert document["scores"] == {
        name: value for name, value in summary["last"].items() if name != "epoch"
    }
    assert (trained / "evals" / "test@last.json").exists()


def test_weights_are_not_read_by_another_prior(trained, monkeypatch, capsys):
    before = (trained / "evals" / "test@last.json").read_bytes()
    for name, value in (("LOSS__TAU_LIST", "2;0"), ("DATA__IMBALANCE_RATIO", "2")):
        with monkeypatch.context() as patch:
            patch.setenv(f"MOECTL_BALPOE__{name}", value)
            assert _run(["balpoe", "eval", "--run", str(trained)]) == 2
        assert "the weights were trained with" in capsys.readouterr().err
    assert (trained / "evals" / "test@last.json").read_bytes() == before


def test_a_training_does_not_go_on_with_another_data_set(trained, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    record = json.loads((folder / "run.json").read_text())
    assert set(record["data"]["images"]) == {"train", "val", "test"}
    record["data"]["digest"] = "other"
    (folder / "run.json").write_text(json.dumps(record))
    assert _run(["balpoe", "train", "--resume", str(folder), "--epochs", "4", "--quiet"]) == 2
    assert "began with other images of synthetic" in capsys.readouterr().err


@pytest.mark.parametrize("change", ["data.profile=step", "data.val_fraction=0.1"])
def test_the_digest_tells_classes_and_division_apart(change):
    def digest(*assignments):
        settings = settings_of("data.image_size=8", *assignments)
        return _facts(settings, load(settings.data, 1))["digest"]

    assert digest() == digest()
    assert digest(change) != digest()


def test_an_import_does_not_go_on_with_a_run(trained, capsys):
    weights = str(trained / "model_best.pth")
    assert _run(["balpoe", "import", weights, "--resume", str(trained)]) == 2
    assert "No such option: --resume" in capsys.readouterr().err


def test_training_tells_scripts_where_the_run_is(tmp_path, capsys):
    folder = tmp_path / "run"
    assert _run(["balpoe", "train", *SMALL, "--epochs", "1", "--out", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["folder"] == str(folder)


def test_weights_are_evaluated_by_epoch_and_unknown_ones_refused(trained):
    assert _run(["balpoe", "eval", "--run", f"{trained}@2", "--quiet", "--no-rejection"]) == 0
    assert (trained / "evals" / "test@epoch2.json").exists()
    assert _run(["balpoe", "eval", "--run", f"{trained}@7"]) == 2


def test_a_training_leaves_a_page(trained, parsed):
    page = parsed(trained / "report.html")
    assert "How to reproduce" in page.words
    assert len(page.all("img")) >= 5


def test_a_public_checkpoint_becomes_a_run_with_the_same_scores(trained, tmp_path, capsys, parsed):
    payload = torch.load(trained / "checkpoint-epoch3.pth", weights_only=True)
    public = tmp_path / "public.pth"
    wrapped = {f"module.{name}": value for name, value in payload["state_dict"].items()}
    torch.save({"arch": "x", "epoch": 3, "state_dict": wrapped}, public)
    folder = tmp_path / "imported"
    assert _run(["balpoe", "import", str(public), *SHAPE, "--out", str(folder)]) == 0
    capsys.readouterr()
    assert _run(["balpoe", "eval", "--run", str(folder), "--json", "--no-rejection"]) == 0
    document = json.loads(capsys.readouterr().out)
    summary = json.loads((trained / "summary.json").read_text())
    assert document["scores"]["accuracy"] == summary["last"]["accuracy"]
    record = json.loads((folder / "run.json").read_text())
    assert record["parents"][0]["path"] == str(public)
    page = parsed(folder / "report.html")
    assert str(public) in page.words
    assert record["parents"][0]["sha256"] in page.words


def test_a_checkpoint_of_another_shape_is_refused_by_name(trained, tmp_path, capsys):
    weights = str(trained / "model_best.pth")
    code = _run(["balpoe", "import", weights, *DATA, "--out", str(tmp_path / "x")])
    assert code == 2
    assert "model_best.pth" in capsys.readouterr().err


def test_initial_weights_depend_on_the_seed_alone():
    torch.manual_seed(99)
    first = build(settings_of("train.seed=5"), 10).state_dict()
    torch.rand(3)
    again = build(settings_of("train.seed=5"), 10).state_dict()
    other = build(settings_of("train.seed=6"), 10).state_dict()
    name = "backbone.conv1.weight"
    assert torch.equal(first[name], again[name])
    assert not torch.equal(first[name], other[name])


def test_the_facts_rebuild_the_model():
    settings = settings_of("model.experts=2", "loss.tau_list=0;2")
    data = load(settings.data, 1)
    facts = facts_of(settings, data)
    assert facts["arguments"]["classes"] == 10
    assert facts["class_counts"] == data.class_counts
    json.dumps(facts)


def test_options_of_the_model_that_do_not_fit_are_the_users_to_mend():
    settings = settings_of("model.arch=resnet50", "model.shortcut=B")
    with pytest.raises(UserError, match="shortcut"):
        build(settings, 10)


def test_the_size_of_the_job_is_that_of_the_published_model():
    settings = settings_of("data.image_size=32")
    found = size(settings)
    assert found["parameters"] == 1_344_784  # ten classes
    assert found["multiply-adds per image"] == 158_515_200 + 3 * 64 * 10
    assert found["updates"] == found["updates per epoch"] * 200
    assert found["memory estimate (MiB)"] > 100


def test_mixing_ends_where_fine_tuning_starts(tmp_path):
    folder = tmp_path / "run"
    assert (
        _run(
            [
                "balpoe",
                "train",
                *SMALL,
                "--epochs",
                "3",
                "--finetuning-start",
                "1",
                "--out",
                str(folder),
            ]
        )
        == 0
    )
    with (folder / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["train/mixing_weight"]]
    assert float(rows[0]["train/mixing_weight"]) < 1
    assert [float(row["train/mixing_weight"]) for row in rows[1:]] == [1.0, 1.0]


def test_early_stopping_leaves_the_last_weights_and_a_finished_run(tmp_path):
    folder = tmp_path / "run"
    # Without a step forward no epoch is better than the first.
    words = [*SMALL, "--epochs", "9", "--patience", "2", "--lr", "1e-9", "--out", str(folder)]
    assert _run(["balpoe", "train", *words]) == 0
    record = json.loads((folder / "run.json").read_text())
    stopped = record["scores"]["last"]["epoch"]
    assert record["status"] == "finished"
    assert record["scores"]["best"]["epoch"] == stopped - 2 < 9
    assert (folder / f"checkpoint-epoch{stopped}.pth").exists()
