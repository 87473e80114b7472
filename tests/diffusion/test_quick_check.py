"""The quick check: a row of every network, remarks from its figures, reasons where one fails."""

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from moectl.diffusion import profile, quick_check
from moectl.diffusion.model import UNet
from moectl.diffusion.quick_check import run_quick_check
from moectl.diffusion.settings import DiffusionSettings
from moectl.diffusion.variants import VARIANTS
from moectl.engine.settings import resolve

TINY = (
    *("model.channels=8", "model.mults=[1, 2]", "model.time_dim=8", "model.class_dim=4"),
    *("model.num_experts=4", "data.image_size=16"),
)


def settings(*assignments: str) -> DiffusionSettings:
    return resolve(DiffusionSettings, {}, (*TINY, *assignments), [])[0]


def checked(*assignments: str, **options: Any) -> tuple[dict[str, Any], list[Table]]:
    usual = {"every": False, "batch": 3, "timed": False, "cpu": True}
    return run_quick_check(settings(*assignments), **{**usual, **options})


def written(tables: list[Table]) -> str:
    text = StringIO()
    console = Console(file=text, width=300)
    for table in tables:
        console.print(table)
    return text.getvalue()


def by_name(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in document["networks"]}


def test_there_is_a_row_of_every_variant_and_all_are_well() -> None:
    document, tables = checked()
    rows = by_name(document)
    assert list(rows) == list(VARIANTS)
    assert {row["result"] for row in rows.values()} == {"ok"}
    assert document["failed"] == []
    assert document["device"] == "cpu"
    assert rows["full"]["output"] == [3, 3, 16, 16]
    assert rows["full"]["router_shapes"] == [[3, 4]]
    assert rows["moe_variants"]["router_shapes"] == [[3, 8]]
    assert [rows[name]["router_logits"] for name in ("full", "no_freq", "minimal")] == [3, 4, 0]
    assert rows["dense_matched"]["used_per_image"] == rows["dense_matched"]["parameters"]
    assert json.loads(json.dumps(document)) == document
    assert len(tables) == 2


def test_table_shows_figures_and_stages() -> None:
    document, tables = checked()
    text = written(tables)
    full = by_name(document)["full"]
    assert f"{full['parameters']:,}" in text
    assert f"{full['macs'] / 1e9:.4g}" in text
    assert "2 of 2" in text
    assert "Stages of full" in text
    assert "3 x 8 x 16 x 16" in text


def test_remark_follows_from_the_figures() -> None:
    document, tables = checked()
    rows = by_name(document)
    (remark,) = document["remarks"]
    for name in VARIANTS:
        more = rows[name]["macs"] > rows["full"]["macs"]
        lacks = name in ("no_moe", "no_freq", "no_dsconv", "minimal")
        ratio = rows[name]["macs"] / rows["full"]["macs"]
        assert (f"{name} {ratio:.2f} times the multiply-adds" in remark) == (more and lacks)
    assert "no_moe" in remark
    assert remark.split(":")[0] in written(tables)


def test_nothing_is_said_of_networks_that_cost_less() -> None:
    assert checked("model.moe=false", "model.dsconv=false", "model.freq=false")[0]["remarks"] == []


def test_original_form_is_well_and_says_what_gets_no_gradient() -> None:
    document, _ = checked("model.compat=seed")
    assert document["failed"] == []
    assert document["remarks"][1].endswith("no_moe 1, minimal 5.")


def test_times_are_measured_only_if_wanted() -> None:
    assert not any("step_ms" in row for row in checked()[0]["networks"])
    document, tables = checked(timed=True)
    assert all(row["forward_ms"] > 0 and row["step_ms"] > 0 for row in document["networks"])
    assert "times the step" in document["remarks"][0]
    assert f"{by_name(document)['full']['step_ms']:.4g}" in written(tables)


def test_network_that_fails_has_a_reason_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usual = quick_check.build

    def fails(arguments: dict[str, Any]) -> UNet:
        if not arguments["freq"]:
            raise RuntimeError("not enough memory: 1 TB\nand a trace")
        if not arguments["dsconv"]:
            raise ValueError
        return usual(arguments)

    monkeypatch.setattr(quick_check, "build", fails)
    document, tables = checked()
    rows = by_name(document)
    assert document["failed"] == ["no_freq", "no_dsconv", "minimal"]
    assert rows["no_freq"]["result"] == "not enough memory: 1 TB"
    assert rows["no_dsconv"]["result"] == "ValueError"
    assert "not enough memory: 1 TB" in written(tables)


def test_failure_of_the_first_leaves_no_stages_and_no_comparison(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(quick_check, "build", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # a fault of the program is not hidden
        checked()

    def fails(arguments: dict[str, Any]) -> UNet:
        raise ValueError(f"model_channels = {arguments['model_channels']}")

    monkeypatch.setattr(quick_check, "build", fails)
    document, tables = checked()
    assert document["failed"] == list(VARIANTS)
    assert document["networks"][0]["result"] == "model_channels = 8"
    assert document["remarks"] == []
    assert len(tables) == 1


@pytest.mark.parametrize(
    ("seen", "reason"),
    [
        ({"finite": False}, "infinite or undefined numbers"),
        ({"without_gradient": ["input_proj.bias"]}, "no gradient: input_proj.bias"),
        ({"output": [3, 3, 8, 8]}, "the noise has the shape [3, 3, 8, 8]"),
        ({"router_logits": 2}, "2 router logits of [[3, 4]]"),
        ({"router_shapes": [[3, 5]]}, "3 router logits of [[3, 5]]"),
    ],
)
def test_what_is_wrong_is_the_result(
    seen: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = profile.check
    monkeypatch.setattr(profile, "check", lambda *args: usual(*args) | seen)
    monkeypatch.setattr(quick_check, "VARIANTS", {"full": {}})
    document, _ = checked()
    assert by_name(document)["full"]["result"] == reason
    assert document["failed"] == ["full"]


def test_all_presets_are_checked_at_their_own_sizes(isolated: Path) -> None:
    folder = isolated / "presets" / "diffusion"
    folder.mkdir(parents=True)
    model = "[model]\nchannels = 8\nmults = [1, 2]\ntime_dim = 8\nclass_dim = 4\n"
    for size in (8, 16):
        text = f"[data]\nimage_size = {size}\n{model}"
        (folder / f"own_{size}.toml").write_text(text, encoding="utf-8")
    found = quick_check._presets()
    assert {"default", "no_moe", "debug", "own_8", "own_16"} <= set(found)
    for name in set(found) - {"own_8", "own_16"}:  # those shipped take too long here
        (folder / f"{name}.toml").write_text(model, encoding="utf-8")
    rows = by_name(checked(every=True, batch=1)[0])
    assert list(rows) == list(found)
    assert {name: rows[name]["image_size"] for name in ("own_8", "own_16", "debug")} == {
        "own_8": 8,
        "own_16": 16,
        "debug": 64,
    }
    assert all(row["result"] == "ok" for row in rows.values())
