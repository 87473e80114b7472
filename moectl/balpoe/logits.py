"""The outputs of a classifier as files: our own, or those of any other classifier.

Letters: N items, E experts, C classes.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from moectl.balpoe.arrays import LARGEST, Array, ArrayFile, numbers, open_arrays, whole
from moectl.balpoe.longtail import split_indices
from moectl.engine.files import is_file, write_bytes

_WHOLE = ("logits", "posteriors", "labels")
_PARTS = [f"{part}_{name}" for part in ("val", "test") for name in (*_WHOLE, "indices")]
_KEYS = (*_WHOLE, *_PARTS, "class_counts", "taus", "class_names", "weights")


@dataclass(frozen=True)
class Outputs:
    """What a classifier says about validation and test items, and what it takes to read it."""

    val_logits: Tensor  # (N, E, C) float32
    val_labels: Tensor  # (N,) int64
    test_logits: Tensor
    test_labels: Tensor
    class_counts: list[int]
    """(C,) training images."""
    taus: list[float]
    """(E,) prior strength of each expert; 0 for a classifier trained with plain cross-entropy."""
    class_names: list[str]
    val_indices: list[int]
    """Which of all held-out items they are; no item is in both parts."""
    test_indices: list[int]
    weights: str
    """SHA-256 of the weights that computed them; empty if unknown."""


class Items(NamedTuple):
    """What a classifier says about items to be judged."""

    logits: Tensor  # (N, E, C) float32
    labels: Tensor | None  # (N,) int64
    weights: str


class _Part(NamedTuple):
    logits: Tensor
    labels: Tensor
    indices: list[int]


def read_outputs(path: Path, val_fraction: float = 0.2, seed: int = 0) -> Outputs:
    """Read the outputs on held-out items, whoever wrote them.

    The file is .npz or .safetensors. It holds `class_counts` and either `logits` and `labels`,
    which are divided here, or those of both parts: `val_logits`, `test_logits` and so on, with
    optional `val_indices` and `test_indices`. Logits are (N, C) or (N, E, C); probabilities may
    stand in their place as `posteriors`. `taus` may be left out for one expert. `class_names` and
    `weights` are metadata (names as a JSON list) or arrays of text.

    Args:
        path: the file.
        val_fraction: share of every class that becomes validation, if the file is undivided.
        seed: which items.

    Raises:
        UserError: naming the file, the key and the row that is wrong.
    """
    file = open_arrays(path, _KEYS)
    counts = whole(file, "class_counts", 1, LARGEST).tolist()
    divided = [key for key in _PARTS if key in file.arrays]
    undivided = [key for key in _WHOLE if key in file.arrays]
    if divided and undivided:
        raise file.wrong(f"holds both {undivided[0]} and {divided[0]}, expected one of them")
    if divided:
        val, test = _given(file, len(counts))
    else:
        val, test = _divide(file, len(counts), val_fraction, seed)
    return Outputs(
        val_logits=val.logits,
        val_labels=val.labels,
        test_logits=test.logits,
        test_labels=test.labels,
        class_counts=counts,
        taus=_taus(file, val.logits.shape[1]),
        class_names=_class_names(file, len(counts)),
        val_indices=val.indices,
        test_indices=test.indices,
        weights=_weights(file),
    )


def write_outputs(path: Path, outputs: Outputs, facts: Mapping[str, str] | None = None) -> None:
    """Write a .safetensors file that `read_outputs` reads back equal, whole or not at all.

    Args:
        path: the file.
        outputs: what to write.
        facts: more texts for its metadata, under other names than `class_names` and `weights`.
    """
    from safetensors.numpy import save

    arrays = {
        "val_logits": outputs.val_logits.numpy(),
        "val_labels": outputs.val_labels.numpy(),
        "val_indices": np.array(outputs.val_indices, dtype=np.int64),
        "test_logits": outputs.test_logits.numpy(),
        "test_labels": outputs.test_labels.numpy(),
        "test_indices": np.array(outputs.test_indices, dtype=np.int64),
        "class_counts": np.array(outputs.class_counts, dtype=np.int64),
        "taus": np.array(outputs.taus, dtype=np.float64),
    }
    names = json.dumps(outputs.class_names)
    metadata = {**(facts or {}), "class_names": names, "weights": outputs.weights}
    # Saving takes memory as it lies, whatever the strides.
    packed = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    write_bytes(path, save(packed, metadata))


def read_facts(path: Path) -> dict[str, str]:
    """Return the metadata of what `write_outputs` wrote; nothing if there is no such file.

    Raises:
        UserError: if the file is damaged.
    """
    return open_arrays(path, ()).metadata if is_file(path) else {}


def read_items(path: Path) -> Items:
    """Read the outputs on new items: `logits` or `posteriors`, and `labels` if they are known.

    Raises:
        UserError: naming the file, the key and the row that is wrong.
    """
    file = open_arrays(path, _KEYS)
    logits = _scores(file, "")
    labels = _labels(file, "labels", logits) if "labels" in file.arrays else None
    return Items(logits, labels, _weights(file))


def _given(file: ArrayFile, classes: int) -> tuple[_Part, _Part]:
    """Read the two parts of a divided file and make sure that they share no item."""
    val, test = _part(file, "val_", classes), _part(file, "test_", classes)
    experts = (val.logits.shape[1], test.logits.shape[1])
    if experts[0] != experts[1]:
        raise file.wrong(f"validation items have {experts[0]} experts, test items {experts[1]}")
    if "val_indices" in file.arrays or "test_indices" in file.arrays:
        val, test = _identified(file, "val_", val), _identified(file, "test_", test)
        shared = len(set(val.indices) & set(test.indices))
    else:
        first = len(val.labels)
        test = test._replace(indices=[first + position for position in test.indices])
        shared = _shared_rows(val, test)
    if shared:
        raise file.wrong(
            f"{shared} items are both validation and test",
            "what is fitted on an item must not be tested on it",
        )
    return val, test


def _identified(file: ArrayFile, prefix: str, part: _Part) -> _Part:
    indices = whole(file, f"{prefix}indices", -LARGEST, LARGEST, len(part.labels))
    if len(np.unique(indices)) < len(indices):
        raise file.wrong(f"{prefix}indices names an item twice")
    return part._replace(indices=indices.tolist())


def _divide(file: ArrayFile, classes: int, val_fraction: float, seed: int) -> tuple[_Part, _Part]:
    logits, labels, _ = _part(file, "", classes)
    val, test = split_indices(labels.numpy(), val_fraction, seed)
    if not len(val):
        raise file.wrong(
            f"none of the {len(labels)} items can be set aside for validation",
            "set aside a positive fraction, of classes with 2 items or more",
        )
    return (
        _Part(logits[val], labels[val], val.tolist()),
        _Part(logits[test], labels[test], test.tolist()),
    )


def _shared_rows(val: _Part, test: _Part) -> int:
    """Count the validation items that recur in the test part, if that cannot be chance."""
    own, others = (
        [row.tobytes() for row in np.column_stack([part.logits.flatten(1), part.labels])]
        for part in (val, test)
    )
    in_test = set(others)
    recurring = sum(row in in_test for row in own)
    # A hard classifier repeats a few rows, whose recurrence says nothing about the items.
    distinct, half = len(set(own)), len(own) / 2
    return recurring if distinct > half and recurring > half else 0


def _part(file: ArrayFile, prefix: str, classes: int) -> _Part:
    logits = _scores(file, prefix)
    if logits.shape[2] != classes:
        raise file.wrong(
            f"{prefix}logits or posteriors are of {logits.shape[2]} classes, class_counts"
            f" of {classes}"
        )
    labels = _labels(file, f"{prefix}labels", logits)
    return _Part(logits, labels, list(range(len(labels))))


def _scores(file: ArrayFile, prefix: str) -> Tensor:
    """Read logits, or posteriors as their logs, (N, E, C) float32."""
    names = (f"{prefix}logits", f"{prefix}posteriors")
    found = [name for name in names if name in file.arrays]
    if not found:
        raise file.missing(" or ".join(names))
    if len(found) == 2:
        raise file.wrong(f"holds both {names[0]} and {names[1]}, expected one of them")
    key = found[0]
    array = numbers(file, key)
    if array.ndim not in (2, 3) or 0 in array.shape:
        raise file.wrong(
            f"{key} has shape {array.shape}, expected at least one each of (items, classes)"
            " or (items, experts, classes)"
        )
    if array.ndim == 2:
        array = array[:, None]
    return _finite(file, key, array) if key == names[0] else _log_posteriors(file, key, array)


def _finite(file: ArrayFile, key: str, array: Array) -> Tensor:
    with np.errstate(over="ignore"):
        logits = np.ascontiguousarray(array, dtype=np.float32)
    fine = np.isfinite(logits).all((1, 2))
    if not fine.all():
        raise file.wrong(f"{key}: row {np.argmin(fine)} is not finite, expected 32-bit numbers")
    return torch.from_numpy(logits)


def _log_posteriors(file: ArrayFile, key: str, array: Array) -> Tensor:
    with np.errstate(invalid="ignore"):
        sums = array.sum(2, dtype=np.float64)
    wrong = ~((array >= 0).all(2) & (np.abs(sums - 1) <= 1e-3))  # NaN is wrong too
    if wrong.any():
        row, expert = np.argwhere(wrong)[0]
        whose = f" of expert {expert}" if array.shape[1] > 1 else ""
        low = array[row, expert].min()
        what = f"holds {low:g}" if low < 0 else f"sums to {sums[row, expert]:.6g}"
        raise file.wrong(
            f"{key}: row {row}{whose} {what}, expected probabilities with sum 1",
            "scores from before the softmax belong under the name logits",
        )
    floor = np.finfo(np.float32).tiny
    return torch.from_numpy(np.log(np.maximum(array.astype(np.float32), floor)))


def _labels(file: ArrayFile, key: str, logits: Tensor) -> Tensor:
    items, _, classes = logits.shape
    return torch.from_numpy(whole(file, key, 0, classes - 1, items))


def _taus(file: ArrayFile, experts: int) -> list[float]:
    if "taus" not in file.arrays:
        if experts == 1:
            return [0.0]
        raise file.wrong(
            f"taus is missing, which {experts} experts need",
            "give the prior strength of each expert, 0 after training with plain cross-entropy",
        )
    taus = numbers(file, "taus").astype(np.float64)
    if taus.shape != (experts,) or not np.isfinite(taus).all():
        raise file.wrong(
            f"taus is {str(taus.tolist())[:80]}, expected one finite number for each of the"
            f" {experts} experts"
        )
    return list(taus.tolist())


def _class_names(file: ArrayFile, classes: int) -> list[str]:
    names: Any = [str(number) for number in range(classes)]
    if "class_names" in file.metadata:
        try:
            names = json.loads(file.metadata["class_names"])
        except (ValueError, RecursionError):
            names = None
    elif "class_names" in file.arrays:
        names = file.arrays["class_names"].tolist()
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise file.wrong("class_names is not a list of texts")
    if len(names) != classes:
        raise file.wrong(f"class_names has {len(names)} entries for {classes} classes")
    return names


def _weights(file: ArrayFile) -> str:
    array = file.arrays.get("weights", np.array(""))
    text = file.metadata.get("weights", array.item() if array.size == 1 else None)
    if not isinstance(text, str):
        raise file.wrong("weights is not a text")
    return text
