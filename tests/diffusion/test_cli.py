"""The commands of diffusion, as they are typed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moectl.engine import presets

Call = Callable[..., tuple[int, str, str]]

LEAVES = ("train", "sample", "eval", "test-model")
DIGITS = ("--data", "digits", "--image-size", "8", "--channel-mults", "1,2")
SMALL = (
    *("--image-size", "8", "--model-channels", "8", "--channel-mults", "1,2", "--num-experts", "3"),
    *("--set", "model.time_dim=8", "--set", "model.class_dim=8"),
)


@pytest.mark.parametrize("leaf", LEAVES)
def test_every_command_explains_itself(diffusion: Call, leaf: str) -> None:
    code, out, err = diffusion(leaf, "--help")
    assert (code, err) == (0, "")
    assert f"moectl diffusion {leaf}" in out


def test_the_room_lists_its_commands(diffusion: Call) -> None:
    code, out, _ = diffusion("--help")
    assert code == 0
    words = out.split()
    assert all(leaf in words for leaf in LEAVES)


@pytest.mark.parametrize(("option", "successor"), [("--config", "--preset"), ("--device", "--cpu")])
def test_dropped_options_name_their_successors(
    diffusion: Call, option: str, successor: str
) -> None:
    code, out, err = diffusion("train", option, "x")
    assert (code, out) == (2, "")
    assert f"{option} is not an option of moectl diffusion train: " in err
    assert successor in err


# Settings


def dry(diffusion: Call, *words: str) -> dict[str, Any]:
    code, out, err = diffusion("train", "--dry-run", "--json", *words)
    assert code == 0, err
    document: dict[str, Any] = json.loads(out)
    return document


def test_switches_of_the_document_are_taken(diffusion: Call, isolated: Path) -> None:
    words = ("--no-moe", "--no-freq", "--no-dsconv", "--num-experts", "16", "--k-active", "4")
    values = dry(diffusion, *DIGITS, *words, "--compat", "seed")["settings"]
    expected = {
        "model.moe": False,
        "model.freq": False,
        "model.dsconv": False,
        "model.num_experts": 16,
        "model.k_active": 4,
        "model.compat": "seed",
        "data.dataset": "digits",
    }
    assert {key: values[key]["value"] for key in expected} == expected
    assert {values[key]["from"] for key in expected} == {"flag"}
    assert list(isolated.iterdir()) == []


def test_a_dry_run_says_how_large_the_job_is(diffusion: Call, isolated: Path) -> None:
    size = dry(diffusion, "--data", "digits", *SMALL, "--batch-size", "100", "--epochs", "3")[
        "size"
    ]
    images = size["training images"]
    assert images + size["held-out images"] == 1797
    assert size["classes"] == 10
    assert (size["updates per epoch"], size["updates"]) == (18, 54)
    assert size["parameters used per image"] < size["parameters"] < 30_000
    assert dry(diffusion)["size"]["updates per epoch"] == 3125
    assert dry(diffusion)["size"]["parameters"] == 60_443_771
    code, out, _ = diffusion("train", "--dry-run", *DIGITS)
    assert code == 0
    assert "(updates per epoch)" in out
    assert list(isolated.iterdir()) == []


def test_presets_of_the_document_are_known(diffusion: Call) -> None:
    names = {preset.name for preset in presets.available("diffusion")}
    assert {"default", "no_moe", "no_freq", "no_dsconv", "minimal", "large_moe"} <= names
    values = dry(diffusion, "--preset", "debug", "--preset", "seed")["settings"]
    expected = {"model.compat": "seed", "model.channels": 32, "loss.balance": "variance"}
    assert {key: values[key]["value"] for key in expected} == expected


# Training, and what reads it


def test_a_training_prints_its_folder(diffusion: Call, isolated: Path) -> None:
    words = ("--data", "digits", *SMALL, "--batch-size", "512", "--epochs", "1", "--cpu")
    rest = ("--sample-every", "0", "--precision", "no", "--out", "here", "--json")
    code, out, err = diffusion("train", *words, *rest)
    assert code == 0, err
    document = json.loads(out)
    assert document["folder"] == "here"
    assert document["status"] == "finished"
    assert document["scores"]["last"]["epoch"] == 1
    assert [entry["file"] for entry in document["weights"]] == ["checkpoint_epoch_1.pth"]
    assert "[Epoch 1/1] Avg Loss: " in err
    code, out, err = diffusion("eval", "--checkpoint", "here", "--features", "none", "--quiet")
    assert (code, err) == (0, "")
    assert "| weights | `checkpoint_epoch_1.pth`, epoch 1, averaged weights |" in out


def test_eval_takes_a_weights_file_of_an_epoch(diffusion: Call, own_run: Path) -> None:
    words = ("--checkpoint", f"{own_run}/checkpoint_epoch_1.pth", "--features", "none")
    code, out, _ = diffusion("eval", *words, "--quiet", "--json")
    assert code == 0
    assert json.loads(out)["weights"]["epoch"] == 1


# The quick check


def test_the_quick_check_prints_a_table(diffusion: Call, isolated: Path) -> None:
    code, out, err = diffusion("test-model", *SMALL, "--batch", "2", "--no-time", "--cpu")
    assert (code, err) == (0, "")
    rows = [line.split() for line in out.splitlines()]
    results = {row[0]: row[-1] for row in rows if len(row) > 5}
    assert results["full"] == results["no_dsconv"] == "ok"
    assert list(isolated.iterdir()) == []


def test_the_quick_check_has_json(diffusion: Call) -> None:
    words = ("--batch", "2", "--no-time", "--cpu", "--json")
    code, out, _ = diffusion("test-model", *SMALL, *words)
    assert code == 0
    document = json.loads(out)
    assert document["failed"] == []
    assert {row["result"] for row in document["networks"]} == {"ok"}


def test_a_network_that_fails_fails_the_check(
    diffusion: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = {"networks": [], "failed": ["full", "minimal"]}
    monkeypatch.setattr(
        "moectl.diffusion.quick_check.run_quick_check", lambda *_, **__: (document, [])
    )
    code, _, err = diffusion("test-model", *SMALL)
    assert code == 1
    assert "full, minimal: not as they should be" in err


# Bad input


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train --num-experts 2 --k-active 3", "model.k_active = 3 is more than model.num_experts"),
        ("train --image-size 60", "data.image_size = 60: expected a multiple of 16"),
        ("train --channel-mults 1,0", "--channel-mults = '0': input should be greater than 0"),
        ("train --channel-mults 1,two", "--channel-mults = 'two'"),
        ("train --set model.mults=[]", "model.mults"),
        ("train --model-channels 12", "--model-channels = 12"),
        ("train --data folder --data-dir nowhere --out run", "nowhere: no such folder"),
        ("train --data faces", "--data"),
        ("train --preset huge", "huge"),
        ("train --ema-decay 1", "--ema-decay = 1.0"),
        ("train --p-uncond 1", "--p-uncond = 1.0"),
        ("train --compat old", "--compat"),
        ("train --set loss.balanced=none", "did you mean loss.balance?"),
        ("train extra", "extra"),
        ("eval", "no finished train run of diffusion"),
        ("eval --run nowhere", "nowhere: no such run"),
        ("eval --features pixels", "--features"),
        ("sample --num 0", "--num"),
        ("sample --checkpoint nowhere.pth", "nowhere.pth"),
        ("test-model --batch 0", "--batch"),
        ("test-model --preset huge", "huge"),
    ],
)
def test_bad_input_is_one_line_with_code_2(
    diffusion: Call, isolated: Path, words: str, message: str
) -> None:
    code, out, err = diffusion(*words.split())
    assert (code, out) == (2, "")
    assert message in err
    errors = [line for line in err.splitlines() if not line.startswith("hint: ")]
    assert len(errors) == 1
    assert errors[0].startswith("error: ")
    if "--out" not in words:
        assert list(isolated.iterdir()) == [], "nothing was created"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--num 5", "--num = 5"),
        ("--steps 1001", "sample.steps = 1001: the process has 1000 steps"),
        ("--eta 0.5", "sample.eta = 0.5 is for ddim, not dpmpp"),
        ("--checkpoint t@7", "no weights @7"),
    ],
)
def test_an_evaluation_that_cannot_be_is_refused(
    diffusion: Call, own_run: Path, words: str, message: str
) -> None:
    code, out, err = diffusion("eval", *words.split())
    assert (code, out) == (2, "")
    assert message in err
    assert not (own_run / "evals").exists()
