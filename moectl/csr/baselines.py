"""What simpler verdicts reach on the same backbone: a linear head, and a concept bottleneck.

Letters: N images, B batch, F backbone channels, K concepts, C classes.
"""

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from moectl.common.intervals import paired
from moectl.csr.data import Part
from moectl.csr.eval import measure_task
from moectl.csr.inference import Opened, open_network
from moectl.csr.metrics import tune_thresholds
from moectl.csr.report import report_again
from moectl.csr.verdict import monitor_of, task_loss, task_scores
from moectl.engine import console
from moectl.engine.command import Request
from moectl.engine.files import write_json
from moectl.engine.optim import build_optimizer, build_schedule
from moectl.engine.seeding import seed_all
from moectl.engine.sources import Stream

if TYPE_CHECKING:
    from rich.table import Table

log = logging.getLogger(__name__)

LINEAR, BOTTLENECK, CSR = "linear head", "concept bottleneck", "csr"


class Inputs(NamedTuple):
    """What the verdicts see of the images of a part, on the CPU."""

    features: Tensor
    """(N, F), means over the feature grid."""
    concepts: Tensor
    """(N, K) logits."""
    logits: Tensor
    """(N, C) of the network itself."""


def run_baselines(request: Request, split: str) -> tuple[dict[str, Any], "Table"]:
    """Train both baselines on the training images of a run, and measure them beside it.

    They are trained as the task head is: the same images, loss, optimiser, epochs and choice of the
    best epoch, on inputs standardised by the training images. Images do not move.

    Args:
        request: the run, its weights and settings.
        split: `test` or `val`.

    Returns:
        The JSON document, and a table.
    """
    opened = open_network(request, verdict=True)
    parts = {name: opened.part(name) for name in ("train", "val", split)}
    seen = {name: _inputs(opened, part) for name, part in parts.items()}
    logits = {CSR: {name: found.logits for name, found in seen.items()}}
    sizes = {CSR: opened.model.task_head.weight.shape[1]}
    for name, field in ((LINEAR, "features"), (BOTTLENECK, "concepts")):
        inputs = _standardised({part: getattr(found, field) for part, found in seen.items()})
        head = fit(opened, inputs)
        sizes[name] = inputs["train"].shape[1]
        with torch.no_grad():
            logits[name] = {part: head(values) for part, values in inputs.items()}
    rows = [_row(opened, parts[split], split, name, logits, sizes[name]) for name in logits]
    document = {"split": split, "weights": opened.weights, "rows": rows}
    folder = opened.folder / "evals" / f"{split}@{opened.tag}"
    if opened.accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "baselines.json", document)
        report_again(opened.folder)
    return {"folder": str(folder), **document}, _table(document)


def _inputs(opened: Opened, part: Part) -> Inputs:
    model = opened.model

    def forward(images: Tensor) -> tuple[Tensor, ...]:
        found = model(images, needs=("features", "concept_logits", "logits"))
        return found.features.mean((2, 3)), found.concept_logits, found.logits

    return Inputs(*opened.gather(part, forward))


def _standardised(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Subtract the mean of the training images, and divide by their standard deviation."""
    mean, deviation = values["train"].mean(0), values["train"].std(0)
    deviation = torch.where(deviation > 1e-6, deviation, torch.ones_like(deviation))
    return {name: (one - mean) / deviation for name, one in values.items()}


def fit(opened: Opened, inputs: Mapping[str, Tensor]) -> nn.Linear:
    """Train a linear head, and return it as it was after its best epoch.

    Args:
        opened: the network whose data and settings are used.
        inputs: (N, features) of `train` and `val`.
    """
    settings, data = opened.settings, opened.data
    section, epochs = settings.task, max(settings.train.epochs_stage3, 1)
    seed_all(settings.train.seed, "baseline")
    head = nn.Linear(inputs["train"].shape[1], len(data.targets))
    rate = settings.optim.lr * section.lr_factor
    optimizer = build_optimizer(
        settings.optim,
        [
            {"params": [head.weight], "weight_decay": settings.optim.weight_decay, "lr": rate},
            {"params": [head.bias], "weight_decay": 0.0, "lr": rate},
        ],
    )
    schedule = build_schedule(settings.schedule, settings.optim.lr, epochs)
    truth = data.train.targets
    counts = truth.sum(0) if opened.multilabel else truth.bincount(minlength=len(data.targets))
    stream = Stream(len(truth), settings.train.batch_size, settings.train.seed)
    best, kept = float("-inf"), head.state_dict()
    for epoch in range(epochs):
        for group in optimizer.param_groups:
            group["lr"] = rate * schedule(epoch)
        for chunk in stream.epoch(epoch):
            logits = head(inputs["train"][chunk.rows])
            loss = task_loss(section, logits, truth[chunk.rows], counts, len(truth))
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
        with torch.no_grad():
            scores = task_scores(head(inputs["val"]), data.val, data.targets)
        score = scores[monitor_of(opened.multilabel)]
        if score is not None and score > best:
            best, kept = score, {name: one.clone() for name, one in head.state_dict().items()}
    head.load_state_dict(kept)
    return head


def _row(
    opened: Opened,
    part: Part,
    split: str,
    name: str,
    logits: Mapping[str, Mapping[str, Tensor]],
    inputs: int,
) -> dict[str, Any]:
    right = {
        one: _right(opened, part, logits[one][split], logits[one]["val"]) for one in (CSR, name)
    }
    better, worse = right[CSR] > right[name], right[CSR] < right[name]
    return {
        "name": name,
        "inputs": inputs,
        "parameters": (inputs + 1) * len(opened.targets),
        "p_value": None if name == CSR else paired(better, worse).p_value,
        "task": measure_task(opened, part, logits[name][split], logits[name]["val"]),
    }


def _right(opened: Opened, part: Part, logits: Tensor, held: Tensor) -> Tensor:
    """Return how many decisions about each image are right, (N,)."""
    if part.targets.ndim == 1:
        return (logits.argmax(1) == part.targets).long()
    thresholds = tune_thresholds(held.numpy(), opened.data.val.targets.numpy())
    said = logits.double().sigmoid() > torch.from_numpy(thresholds)
    return (said == (part.targets >= 0.5)).sum(1)


def _table(document: Mapping[str, Any]) -> "Table":
    rows: list[list[object]] = []
    for row in document["rows"]:
        task = row["task"]
        score = task.get("f1_macro_tuned", task["f1_macro"])
        rows.append(
            [
                row["name"],
                row["inputs"],
                task["auroc_macro"],
                task["map"],
                score,
                task.get("accuracy"),
                row["p_value"],
            ]
        )
    columns = ("verdict", "inputs", "AUROC", "AP", "F1", "accuracy", "p against csr")
    return console.table(columns, rows, f"{document['split']} images, means of the targets")
