"""Whether networks work, what they cost and how large they are, without data."""

import logging
from typing import TYPE_CHECKING, Any

import torch

from moectl.diffusion import profile
from moectl.diffusion.blocks import MixtureBlock
from moectl.diffusion.model import UNet, build
from moectl.diffusion.settings import DiffusionSettings
from moectl.diffusion.variants import VARIANTS, arguments_of, variant
from moectl.engine import console, presets
from moectl.engine.settings import from_toml

if TYPE_CHECKING:
    from rich.table import Table

log = logging.getLogger(__name__)

_CLASSES = 10
_COLUMNS = (
    "name",
    "image",
    "parameters",
    "used per image",
    "GMAC",
    "forward ms",
    "step ms",
    "router logits",
    "experts hit",
    "without gradient",
    "result",
)


def run_quick_check(
    settings: DiffusionSettings, *, every: bool, batch: int, timed: bool, cpu: bool = False
) -> "tuple[dict[str, Any], list[Table]]":
    """Build, run and measure a network and its variants, one at a time, in float32.

    Nothing is raised for a network that does not work: `failed` of the document names it.

    Args:
        settings: the network; its variants are checked too.
        every: check all presets instead, each at its own size of image.
        batch: random images in a batch.
        timed: measure milliseconds too.
        cpu: stay on the CPU.

    Returns:
        The JSON document, a table of the networks, and one of the stages of the first.
    """
    device = torch.device("cuda" if torch.cuda.is_available() and not cpu else "cpu")
    wanted = _presets() if every else {name: variant(settings, name) for name in VARIANTS}
    rows: list[dict[str, Any]] = []
    with console.progress(len(wanted)) as bar:
        for number, (name, one) in enumerate(wanted.items(), 1):
            rows.append({"name": name, **_row(one, batch, timed, device)})
            bar.update(number, name)
    document = {
        "device": str(device),
        "batch": batch,
        "networks": rows,
        "remarks": _remarks(rows, wanted),
        "failed": [row["name"] for row in rows if row["result"] != "ok"],
    }
    return document, _tables(document)


def _presets() -> dict[str, DiffusionSettings]:
    found = presets.available("diffusion")
    return {preset.name: from_toml(DiffusionSettings, preset.path) for preset in found}


def _row(
    settings: DiffusionSettings, batch: int, timed: bool, device: torch.device
) -> dict[str, Any]:
    """Return what is known of one network, which is gone afterwards."""
    size = settings.data.image_size
    row: dict[str, Any] = {"image_size": size}
    torch.manual_seed(settings.train.seed)
    try:
        model = build(arguments_of(settings, _CLASSES)).to(device)
        row["parameters"], row["used_per_image"] = profile.parameters(model)
        row["macs"] = profile.macs(model, size)
        row["stages"] = dict(profile.shapes(model, size, batch))
        row |= profile.check(model, size, batch)
        if timed:
            row |= profile.times(model, size, batch)._asdict()
    except (RuntimeError, ValueError) as error:  # a size that does not fit, memory that is gone
        return {**row, "result": (str(error).splitlines() or [type(error).__name__])[0]}
    return {**row, "result": _fault(row, model, settings, batch) or "ok"}


def _fault(row: dict[str, Any], model: UNet, settings: DiffusionSettings, batch: int) -> str:
    """Say what is wrong with a network that ran; nothing if it is well."""
    size, missing = settings.data.image_size, row["without_gradient"]
    blocks = sum(isinstance(part, MixtureBlock) for part in model.modules())
    shapes = [[batch, settings.model.num_experts]] if blocks else []
    if row["output"] != [batch, 3, size, size]:
        return f"the noise has the shape {row['output']}"
    if row["router_logits"] != blocks or row["router_shapes"] != shapes:
        return f"{row['router_logits']} router logits of {row['router_shapes']}"
    if not row["finite"]:
        return "infinite or undefined numbers"
    if missing and settings.model.compat == "none":
        return f"no gradient: {', '.join(missing)}"
    return ""


def _remarks(rows: list[dict[str, Any]], settings: dict[str, DiffusionSettings]) -> list[str]:
    """Return sentences on what the rows show."""
    remarks = []
    whole = next((row for row in rows if row["name"] in ("full", "default")), {})
    costlier = [row for row in rows if _lacks_a_part_yet_costs_more(row, whole, settings)]
    if costlier:
        ratios = "; ".join(f"{row['name']} {_ratios(row, whole)}" for row in costlier)
        remarks.append(f"Without a part, yet more arithmetic than {whole['name']}: {ratios}.")
    deaf = [row for row in rows if row["result"] == "ok" and row["without_gradient"]]
    if deaf:
        counts = ", ".join(f"{row['name']} {len(row['without_gradient'])}" for row in deaf)
        remarks.append(f"In the original's form some weights get no gradient: {counts}.")
    return remarks


def _lacks_a_part_yet_costs_more(
    row: dict[str, Any], whole: dict[str, Any], settings: dict[str, DiffusionSettings]
) -> bool:
    if "macs" not in row or "macs" not in whole or row["image_size"] != whole["image_size"]:
        return False
    own, full = settings[row["name"]].model, settings[whole["name"]].model
    parts = [(own.moe, full.moe), (own.freq, full.freq), (own.dsconv, full.dsconv)]
    return any(there and not here for here, there in parts) and row["macs"] > whole["macs"]


def _ratios(row: dict[str, Any], whole: dict[str, Any]) -> str:
    said = f"{row['macs'] / whole['macs']:.2f} times the multiply-adds"
    if "step_ms" in row and "step_ms" in whole:
        said += f", {row['step_ms'] / whole['step_ms']:.2f} times the step"
    return said


def _tables(document: dict[str, Any]) -> "list[Table]":
    rows = document["networks"]
    title = f"{document['batch']} random images, float32, {document['device']}"
    networks = console.table(_COLUMNS, [_cells(row) for row in rows], title)
    for column in networks.columns[1:-2]:
        column.justify = "right"
    networks.caption = "\n".join(document["remarks"]) or None
    networks.caption_justify = "left"
    stages = list(rows[0].get("stages", {}).items())
    if not stages:
        return [networks]
    return [networks, console.table(("stage", "comes out"), stages, f"Stages of {rows[0]['name']}")]


def _cells(row: dict[str, Any]) -> list[object]:
    return [
        row["name"],
        f"{row['image_size']} px",
        _thousands(row.get("parameters")),
        _thousands(row.get("used_per_image")),
        row["macs"] / 1e9 if "macs" in row else None,
        row.get("forward_ms"),
        row.get("step_ms"),
        row.get("router_logits"),
        _hit(row),
        len(row["without_gradient"]) if "without_gradient" in row else None,
        row["result"],
    ]


def _hit(row: dict[str, Any]) -> str | None:
    """Write the fewest and the most experts of a block that were hit."""
    hit = row.get("experts_hit")
    if not hit:
        return None
    least = f"{min(hit)} to " if min(hit) < max(hit) else ""
    return f"{least}{max(hit)} of {row['router_shapes'][0][1]}"


def _thousands(count: int | None) -> str | None:
    return None if count is None else f"{count:,}"
