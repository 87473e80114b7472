"""The comparison of variants: what is planned, trained, measured, skipped and shown."""

import csv
import json
import shutil
from pathlib import Path

import pytest

from moectl.diffusion.ablate import settings_of
from moectl.diffusion.settings import DiffusionSettings, ModelSection
from moectl.diffusion.variants import plan
from moectl.engine.errors import UserError

BASE = ModelSection(num_experts=4, k_active=2)
TINY = (
    "--data", "digits", "--image-size", "8", "--model-channels", "8", "--channel-mults", "1,2",
    "--set", "model.num_experts=3", "--set", "model.time_dim=8", "--set", "model.class_dim=8",
    "--set", "data.val_fraction=0.1", "--set", "train.precision=no", "--batch-size", "512",
    "--epochs", "1", "--sample-every", "0", "--ema-decay", "0.9", "--quiet",
    "--num", "12", "--steps", "2",
)  # fmt: skip


def planned(**words):
    given = {"switched_off": [], "experts": "", "active": "", "every": False, **words}
    return plan(BASE, **given)


class TestPlan:
    def test_a_switch_makes_one_variant_beside_the_full_network(self):
        assert planned(switched_off=["freq"]) == {"full": {}, "no_freq": {"freq": False}}

    def test_switches_together_make_one_variant(self):
        found = planned(switched_off=["moe", "dsconv"])
        assert found == {"full": {}, "no_moe+no_dsconv": {"moe": False, "dsconv": False}}

    def test_lists_make_a_grid(self):
        found = planned(experts="4,8", active="1,2")
        assert list(found)[1:] == [f"experts{count}+active{k}" for count in (4, 8) for k in (1, 2)]
        assert found["experts8+active1"] == {"num_experts": 8, "k_active": 1}

    def test_a_number_goes_with_a_switch(self):
        found = planned(switched_off=["freq"], experts="2")
        assert found["no_freq+experts2"] == {"freq": False, "num_experts": 2}

    def test_all_are_those_of_the_original_and_a_control(self):
        found = planned(every=True)
        assert list(found) == [
            "full", "no_moe", "no_freq", "no_dsconv", "minimal", "moe_variants", "dense_matched",
        ]  # fmt: skip
        assert found["moe_variants"] == {"num_experts": 8, "k_active": 4}
        assert found["dense_matched"] == {"num_experts": 2}

    def test_nothing_to_compare_is_refused(self):
        with pytest.raises(UserError, match="nothing to compare"):
            planned()

    def test_all_goes_alone(self):
        with pytest.raises(UserError, match="--all goes with no other"):
            planned(every=True, experts="4")

    @pytest.mark.parametrize("words", ["two", "4,", "0", "4,-1", "1.5", "²"])
    def test_numbers_are_numbers(self, words):
        with pytest.raises(UserError, match="whole numbers"):
            planned(experts=words)


def test_variants_differ_from_the_base_in_the_model_alone():
    base = DiffusionSettings()
    base = base.model_copy(update={"train": base.train.model_copy(update={"max_time": "1h"})})
    found = settings_of(base, {"moe": False})
    assert found.model == base.model.model_copy(update={"moe": False})
    assert found.train.max_time == ""
    assert found.optim == base.optim
    assert found.loss == base.loss


def test_a_variant_that_cannot_be_is_refused_before_any_training():
    with pytest.raises(UserError, match="k_active = 4 is more than"):
        settings_of(DiffusionSettings(), {"num_experts": 2, "k_active": 4})


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A comparison of two variants with the full network."""
    from moectl.cli import _run

    root = tmp_path_factory.mktemp("ablation")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOECTL_RUNS", str(root / "runs"))
        words = ("--no-freq", "--num-experts", "2,3", "--out", str(root / "a"))
        assert _run(["diffusion", "ablate", *TINY, *words]) == 0
    return root / "a"


@pytest.fixture
def own(compared, tmp_path, monkeypatch):
    """The same, as a copy that may be changed, with its classifier."""
    monkeypatch.setenv("MOECTL_RUNS", str(tmp_path / "runs"))
    classifiers = compared.parent / "runs" / "diffusion" / "classifiers"
    shutil.copytree(classifiers, tmp_path / "runs" / "diffusion" / "classifiers")
    return shutil.copytree(compared, tmp_path / "a")


def rows_of(folder: Path) -> dict[str, dict]:
    return {
        row["name"]: row for row in json.loads((folder / "ablation.json").read_text())["variants"]
    }


def test_every_variant_has_a_row_with_its_cost_and_worth(compared):
    rows = rows_of(compared)
    assert list(rows) == ["full", "no_freq+experts2", "no_freq+experts3"]
    for row in rows.values():
        assert row["loss"] > 0
        assert row["frechet"] > 0
        assert row["distance"].startswith("FD[classifier:")
        assert 0 <= row["sample_accuracy"] <= 1
        assert row["images_per_second"] > 0
        assert row["parameters"] >= row["parameters_used"] > 0
    assert rows["no_freq+experts2"]["parameters"] < rows["no_freq+experts3"]["parameters"]
    assert rows["no_freq+experts2"]["macs"] == pytest.approx(
        rows["no_freq+experts3"]["macs"], rel=0.01
    )


def test_all_share_one_classifier(compared):
    assert len({row["distance"] for row in rows_of(compared).values()}) == 1


def test_a_comparison_and_its_variants_have_pages(compared, parsed):
    words = parsed(compared / "report.html").words
    assert "variants/full" in words
    assert "Variants" in words
    words = parsed(compared / "variants" / "full" / "report.html").words
    assert "Made from" in words
    assert str(compared.resolve()) in words


def test_the_files_of_a_comparison(compared):
    with (compared / "ablation.csv").open(newline="") as file:
        assert [row["name"] for row in csv.DictReader(file)] == list(rows_of(compared))
    report = (compared / "report.md").read_text()
    assert "| full |" in report
    assert "side_by_side.png" in report
    assert (compared / "plots" / "losses.png").stat().st_size > 1000
    for name in rows_of(compared):
        folder = compared / "variants" / name
        assert json.loads((folder / "run.json").read_text())["status"] == "finished"
        assert (folder / "checkpoint_epoch_1.pth").exists()


def test_variants_see_the_same_noise(compared):
    """Full and no_freq begin differently, yet their samples begin with the same noise: the
    first loss of two networks that predict nothing is the same."""
    metrics = [
        (compared / "variants" / name / "metrics.csv").read_text().splitlines()[1]
        for name in ("no_freq+experts2", "no_freq+experts3")
    ]
    first = [float(line.split(",")[4]) for line in metrics]
    assert first[0] == pytest.approx(first[1], rel=0.05)


def test_finished_variants_are_not_done_again(own, diffusion):
    before = {path: path.stat().st_mtime_ns for path in own.glob("variants/*/*.pth")}
    shutil.rmtree(own / "variants" / "no_freq+experts3")
    kept = rows_of(own)["full"]
    code, out, err = diffusion("ablate", "--resume", str(own), "--json")
    assert code == 0, err
    rows = {row["name"]: row for row in json.loads(out)["variants"]}
    assert list(rows) == ["full", "no_freq+experts2", "no_freq+experts3"]
    assert rows["full"] == kept
    after = {path: path.stat().st_mtime_ns for path in own.glob("variants/*/*.pth")}
    assert set(after) == set(before)
    again = {path for path in before if after[path] != before[path]}
    assert {path.parent.name for path in again} == {"no_freq+experts3"}


def test_a_variant_that_was_trained_but_not_measured_is_measured(own, diffusion):
    (own / "variants" / "full" / "result.json").unlink()
    weights = (own / "variants" / "full" / "checkpoint_epoch_1.pth").stat().st_mtime_ns
    before = rows_of(own)["full"]
    assert diffusion("ablate", "--resume", str(own))[0] == 0
    assert (own / "variants" / "full" / "checkpoint_epoch_1.pth").stat().st_mtime_ns == weights
    after = rows_of(own)["full"]
    for name in ("loss", "frechet", "kid", "sample_accuracy", "macs"):
        assert after[name] == before[name], name


def test_a_folder_that_hardly_began_is_begun_again(own, diffusion):
    folder = own / "variants" / "full"
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "settings.toml").write_text("torn")
    assert diffusion("ablate", "--resume", str(own))[0] == 0
    assert rows_of(own)["full"]["loss"] > 0


def test_a_comparison_keeps_its_variants(own, diffusion):
    code, _, err = diffusion("ablate", "--no-moe", "--resume", str(own))
    assert code == 2
    assert "compares full, no_freq+experts2, no_freq+experts3, not full, no_moe" in err


def test_a_failed_variant_is_named_and_the_others_are_done(tmp_path, diffusion, monkeypatch):
    from moectl.diffusion import ablate as module
    from moectl.engine.errors import RunFailed

    monkeypatch.setenv("MOECTL_RUNS", str(tmp_path / "runs"))
    whole = module.train

    def train(settings, run):
        if not settings.model.freq:
            raise RunFailed("loss not finite")
        whole(settings, run)

    monkeypatch.setattr(module, "train", train)
    words = ("--no-freq", "--features", "none", "--out", str(tmp_path / "a"))
    code, out, err = diffusion("ablate", *TINY, *words)
    assert code == 1
    assert "no_freq: failed" in err
    assert "loss not finite" in out
    rows = rows_of(tmp_path / "a")
    assert rows["no_freq"]["failed"] == "loss not finite"
    assert rows["full"]["loss"] > 0


def test_an_interrupted_comparison_says_how_to_go_on(tmp_path, diffusion, monkeypatch):
    monkeypatch.setenv("MOECTL_RUNS", str(tmp_path / "runs"))
    folder = tmp_path / "a"
    words = ("--no-freq", "--features", "none", "--out", str(folder))
    code, _, err = diffusion("ablate", *TINY, *words, "--max-time", "0.01s")
    assert code == 75
    assert f"--resume {folder} goes on" in err
    assert json.loads((folder / "run.json").read_text())["status"] == "interrupted"
    code, _, err = diffusion("ablate", "--resume", str(folder))
    assert code == 0, err
    assert list(rows_of(folder)) == ["full", "no_freq"]


def test_no_variant_is_a_usage_error(diffusion):
    code, _, err = diffusion("ablate", *TINY)
    assert code == 2
    assert "--all" in err
    assert not Path("runs").exists()


def test_epochs_are_those_of_all_variants(own, diffusion):
    code, _, err = diffusion("ablate", "--resume", str(own), "--epochs", "3")
    assert code == 2
    assert "train.epochs = 3 (the run has 1)" in err


def test_variants_must_see_the_same_images(tmp_path, diffusion, monkeypatch):
    from PIL import Image

    monkeypatch.setenv("MOECTL_RUNS", str(tmp_path / "runs"))
    for name, count in (("one", 30), ("two", 31)):
        for place in range(count):
            path = tmp_path / name / "ab"[place % 2] / f"{place}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (8 * place, 0, 0)).save(path)
    folder = tmp_path / "a"
    words = ["--no-freq", "--features", "none", "--data", "folder", "--set", "data.workers=0"]
    words = [*TINY[2:], *words, "--data-dir", str(tmp_path / "one"), "--out", str(folder)]
    assert diffusion("ablate", *words)[0] == 0
    shutil.rmtree(folder / "variants" / "no_freq")
    code, _, err = diffusion("ablate", "--resume", str(folder), "--data-dir", str(tmp_path / "two"))
    assert code == 2
    assert "began with other images of folder" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--timesteps", "20", "--steps", "50"), "the process has 20 steps"),
        (("--p-uncond", "0", "--cfg-scale", "2"), "nothing to guide away from"),
        (("--eta", "0.5"), "is for ddim"),
    ],
)
def test_what_cannot_be_sampled_is_refused_before_any_training(tmp_path, diffusion, words, said):
    code, _, err = diffusion("ablate", *TINY, "--no-moe", *words, "--out", str(tmp_path / "a"))
    assert code == 2
    assert said in err
    assert not (tmp_path / "a" / "variants").exists()


def test_out_of_memory_is_told_of_one_variant(tmp_path, diffusion, monkeypatch):
    import torch

    from moectl.diffusion import ablate as module

    monkeypatch.setenv("MOECTL_RUNS", str(tmp_path / "runs"))
    whole = module.train

    def train(settings, run):
        if not settings.model.freq:
            raise torch.OutOfMemoryError("too much")
        whole(settings, run)

    monkeypatch.setattr(module, "train", train)
    words = ("--no-freq", "--features", "none", "--out", str(tmp_path / "a"))
    assert diffusion("ablate", *TINY, *words)[0] == 1
    assert rows_of(tmp_path / "a")["no_freq"]["failed"] == "too much"


def test_out_of_memory_in_one_of_several_processes_ends_them_all(monkeypatch):
    from types import SimpleNamespace

    import torch

    from moectl.diffusion import ablate as module

    def fail(*_):
        raise torch.OutOfMemoryError("too much")

    monkeypatch.setattr(module, "agree", lambda *_: None)
    monkeypatch.setattr(module, "_train", fail)
    run = SimpleNamespace(folder=Path(), accelerator=SimpleNamespace(num_processes=2))
    with pytest.raises(torch.OutOfMemoryError):
        module._row(run, "no_freq", DiffusionSettings(), {}, lambda: None)


def test_a_signal_at_the_end_of_a_variant_is_heard(tmp_path, diffusion, monkeypatch):
    import os
    import signal

    from moectl.diffusion import ablate as module

    monkeypatch.setenv("MOECTL_RUNS", str(tmp_path / "runs"))
    whole = module.train

    def train(settings, run):
        whole(settings, run)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(module, "train", train)
    words = ("--no-freq", "--features", "none", "--out", str(tmp_path / "a"))
    code, _, err = diffusion("ablate", *TINY, *words)
    assert code == 75
    assert "SIGTERM" in err


def test_equal_networks_are_trained_once(caplog):
    from moectl.diffusion.ablate import distinct

    base = DiffusionSettings()
    found = {
        name: settings_of(base, own)
        for name, own in {
            "full": {},
            "experts8": {"num_experts": 8},
            "no_moe+experts4": {"moe": False, "num_experts": 4},
            "no_moe+experts2": {"moe": False, "num_experts": 2},
        }.items()
    }
    assert distinct(found) == ["full", "no_moe+experts4"]
    with pytest.raises(UserError, match="every variant is the same network"):
        distinct({"full": found["full"], "experts8": found["experts8"]})


def test_the_same_command_goes_on_although_a_variant_was_left_out(tmp_path, diffusion, monkeypatch):
    monkeypatch.setenv("MOECTL_RUNS", str(tmp_path / "runs"))
    words = ("--num-experts", "2,3", "--features", "none")
    assert diffusion("ablate", *TINY, *words, "--out", str(tmp_path / "a"))[0] == 0
    assert list(rows_of(tmp_path / "a")) == ["full", "experts2"]
    code, _, err = diffusion("ablate", *TINY, *words, "--resume", str(tmp_path / "a"))
    assert code == 0, err
