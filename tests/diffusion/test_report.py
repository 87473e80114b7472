"""Reports: what stands in them, and that nothing missing or torn stops them."""

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moectl.diffusion import report as module
from moectl.diffusion.report import ablation_text, evaluation_text, report, report_again

LOSS = {
    "weights": {"file": "checkpoint_epoch_7.pth", "epoch": 7, "ema": True, "sha256": "0"},
    "held_out": 90,
    "loss": 0.12345,
}
SAMPLED = LOSS | {
    "dead_experts": 5,
    "distance": "FD[classifier:01234567]",
    "sampling": {
        "num": 60, "sampler": "ddim", "steps": 9, "guidance": 1.5, "eta": 0.25, "seed": 3,
        "images_per_second": 12.345,
    },
    "distances": [
        {
            "set": "samples", "against": "held-out images", "images": 60, "against_images": 90,
            "frechet": 1.2345, "kid": -0.00012, "kid_std": 0.25, "precision": 0.5, "recall": 0.125,
        }
    ],
    "warning": "Far too few.",
    "sample_accuracy": 0.625,
    "held_out_accuracy": 0.99,
}  # fmt: skip


@pytest.fixture(autouse=True)
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Draw nothing, but keep what would be drawn, by the name of the file."""
    kept: dict[str, Any] = {}

    def draw(path: Path, *given: Any) -> None:
        kept[path.name] = given
        path.write_bytes(b"")

    for name in ("learning_curve", "loss_by_step", "losses", "side_by_side"):
        monkeypatch.setattr(module, name, draw)
    return kept


@pytest.fixture
def folder(finished_run: Path, tmp_path: Path) -> Path:
    """A run without its weights, to write into; the report and plots are gone."""
    left_out = shutil.ignore_patterns("*.pth*", "checkpoints", "tensorboard", "plots", "report.md")
    return shutil.copytree(finished_run, tmp_path / "t", ignore=left_out)


def written(folder: Path) -> str:
    report(folder)
    return (folder / "report.md").read_text()


def row(text: str, start: str) -> list[str]:
    """Return the cells of the first table row that begins with a text."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {start} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def keep(folder: Path, name: str, document: Any) -> Path:
    place = folder / "evals" / name
    place.mkdir(parents=True)
    (place / "eval.json").write_text(json.dumps(document))
    return place


# Runs


def test_what_was_run_is_said(folder: Path) -> None:
    text = written(folder)
    assert text.startswith("# t\n")
    assert row(text, "seed")[1] == "0"
    assert row(text, "`model.num_experts`")[1:] == ["3", "8", "flag"]
    assert "`model.k_active`" not in text


def test_a_training_has_a_page(finished_run: Path, parsed: Callable[[Path], Any]) -> None:
    page = parsed(finished_run / "report.html")
    assert "How to reproduce" in page.words
    assert len(page.all("img")) >= 3, "curves and samples"


def test_the_first_and_last_epoch_stand_beside_each_other(
    folder: Path, drawn: dict[str, Any]
) -> None:
    text = written(folder)
    lines = (folder / "metrics.csv").read_text().splitlines()
    names = lines[0].split(",")
    ends = [dict(zip(names, lines[place].split(","), strict=True)) for place in (1, -1)]
    assert [end["epoch"] for end in ends] == ["1", "2"]
    header = next(line for line in text.splitlines() if "epoch 1 |" in line)
    assert header == "|  | epoch 1 | epoch 2 |"
    for name in ("train/dm_loss", "train/load_loss", "val/loss", "load/largest", "load/dead"):
        assert row(text, name)[1:] == [f"{float(end[name]):.4g}" for end in ends]
    curves, steps = drawn["loss_by_step.png"]
    assert steps == 1000
    assert curves["epoch 2"] == [float(ends[1][f"loss_by_step/{span}"]) for span in range(10)]
    assert [one["epoch"] for one in drawn["learning_curve.png"][0]] == ["1", "2"]


def test_an_only_epoch_stands_alone(folder: Path, drawn: dict[str, Any]) -> None:
    path = folder / "metrics.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    assert "\n|  | epoch 1 |\n" in written(folder)
    assert list(drawn["loss_by_step.png"][0]) == ["epoch 1"]


def test_tenths_without_images_are_gaps(folder: Path, drawn: dict[str, Any]) -> None:
    path = folder / "metrics.csv"
    names, *lines = (line.split(",") for line in path.read_text().splitlines())
    for line in lines:
        line[names.index("loss_by_step/4")] = ""
        line[names.index("load/dead")] = ""
    path.write_text("".join(",".join(line) + "\n" for line in (names, *lines)))
    assert "load/dead" not in written(folder)
    assert [value is None for value in drawn["loss_by_step.png"][0]["epoch 1"]].index(True) == 4


def test_pictures_are_linked_and_samples_are_the_newest(folder: Path) -> None:
    for epoch in (9, 10):
        (folder / "samples" / f"epoch_{epoch}.png").write_bytes(b"")
    text = written(folder)
    assert "![learning curve](plots/learning_curve.png)" in text
    assert [line for line in text.splitlines() if "samples/" in line] == [
        "![epoch 10](samples/epoch_10.png)"
    ]


def test_an_empty_folder_has_a_report(tmp_path: Path) -> None:
    assert written(tmp_path) == f"# {tmp_path.name}\n"


def test_no_report_is_written_where_there_is_no_run(folder: Path, tmp_path: Path) -> None:
    report_again(tmp_path)
    assert not (tmp_path / "report.md").exists()
    report_again(folder)
    assert (folder / "report.md").exists()


def test_a_process_without_torch_can_write_reports(folder: Path, root: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from moectl.diffusion.report import report;"
        "report(Path(sys.argv[1])); sys.exit('torch' in sys.modules)"
    )
    assert (
        subprocess.run([sys.executable, "-c", code, folder], cwd=root, check=False).returncode == 0
    )


# Evaluations


def test_every_evaluation_is_told_of_in_order(folder: Path) -> None:
    for name in ("b", "a"):
        (keep(folder, name, SAMPLED) / "grid.png").write_bytes(b"")
    (keep(folder, "torn", {}) / "eval.json").write_text('{"loss": ')
    text = written(folder)
    assert text.index("## `a`") < text.index("## `b`") < text.index("(evals/a/grid.png)")
    assert "## `torn`" not in text


def test_text_of_loss_and_experts() -> None:
    text = evaluation_text(LOSS)
    assert row(text, "weights")[1] == "`checkpoint_epoch_7.pth`, epoch 7, averaged weights"
    assert row(text, "loss on 90 held-out images")[1] == "0.1235"
    assert "experts" not in text
    assert "samples" not in text
    assert row(evaluation_text(SAMPLED), "experts that no image used")[1] == "5"
    raw = copy.deepcopy(LOSS)
    raw["weights"]["ema"] = False  # type: ignore[index]
    assert "weights of the last update" in evaluation_text(raw)


def test_text_of_samples_says_how_they_were_made() -> None:
    text = evaluation_text(SAMPLED)
    assert "60 samples by ddim in 9 steps, guidance scale 1.5, eta 0.25, seeds from 3 on" in text
    assert "12.3 images a second" in text
    assert row(text, "set")[4:6] == ["FD[classifier:01234567]", "KID"]
    assert row(text, "samples")[1:] == [
        *("held-out images", "60", "90", "1.234", "-0.0001 ± 0.2500", "0.500", "0.125")
    ]
    assert "62.5 % of the samples" in text
    assert "99.0 % of the held-out images" in text
    assert text.endswith("Far too few.\n")


def test_what_is_usual_is_left_unsaid() -> None:
    plain = copy.deepcopy(SAMPLED) | {"warning": ""}
    plain["sampling"] |= {"guidance": 1.0, "eta": 0.0}  # type: ignore[operator]
    text = evaluation_text(plain)
    assert "guidance" not in text
    assert "eta" not in text
    assert text.endswith("right.\n")


def test_fid_needs_no_excuse() -> None:
    text = evaluation_text(SAMPLED | {"distance": "FID"})
    assert "literature" not in text
    assert row(text, "set")[4] == "FID"


# Comparisons


def test_variants_have_a_table_and_pictures(folder: Path, drawn: dict[str, Any]) -> None:
    full = {"name": "full", "parameters": 1200, "parameters_used": 900, "macs": 2e9, "loss": 0.5}
    rows = [
        full | {"images_per_second": 1234.5},
        full | {"name": "no_moe", "macs": 3e9, "images_per_second": 10.0, "recall": 0.25},
        {"name": "no_freq", "failed": "loss not finite"},
    ]
    (folder / "ablation.json").write_text(json.dumps({"variants": rows}))
    place = folder / "variants" / "full"
    place.mkdir(parents=True)
    shutil.copy(folder / "metrics.csv", place)
    (place / "strip.png").write_bytes(b"")
    text = written(folder)
    assert row(text, "full")[1:6] == ["1,200", "900", "2", "1,234", "0.5000"]
    assert row(text, "no_freq")[1] == "loss not finite"
    assert "left out: no_moe 1.50 times." in text
    assert list(drawn["losses.png"][0]) == list(drawn["side_by_side.png"][0]) == ["full"]
    assert "More arithmetic" not in ablation_text({"variants": rows[:1]})
