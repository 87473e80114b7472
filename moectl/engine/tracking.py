"""Numbers over time: running means, metrics.csv, and the trackers of accelerate."""

import csv
import importlib.util
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moectl.engine.errors import UserError
from moectl.engine.files import write_text

if TYPE_CHECKING:
    import torch
    from accelerate.tracking import GeneralTracker
    from torch import Tensor

    from moectl.engine.run import Run

FIRST = ("update", "epoch", "elapsed_seconds")


class Means:
    """Weighted running means of named scalars; the sums stay on the device until they are read."""

    def __init__(self) -> None:
        self.names: tuple[str, ...] = ()
        self.sums: Tensor | None = None
        self.weight = 0.0

    def add(self, names: tuple[str, ...], values: "Tensor", weight: float) -> None:
        """Add one batch of values (n,) whose share is `weight`."""
        self.names = names
        self.sums = values * weight if self.sums is None else self.sums + values * weight
        self.weight += weight

    def state(self) -> dict[str, float]:
        """Read the sums to the host, the weight under an empty name."""
        sums = {} if self.sums is None else dict(zip(self.names, self.sums.tolist(), strict=True))
        return {"": self.weight, **sums}

    def restore(self, state: Mapping[str, float], device: "torch.device") -> None:
        """Continue from a saved state."""
        import torch

        self.names = tuple(name for name in state if name)
        sums = [state[name] for name in self.names]
        self.sums = torch.tensor(sums, dtype=torch.float64, device=device) if sums else None
        self.weight = state[""]

    def clear(self) -> None:
        """Start a new window."""
        self.sums, self.weight = None, 0.0


def mean_over(states: "list[dict[str, float]]") -> dict[str, float]:
    """Combine the states of all processes into means."""
    weight = sum(state.get("", 0.0) for state in states)
    names = [name for name in states[0] if name]
    if not weight:
        return {}
    return {name: sum(state[name] for state in states) / weight for name in names}


class MetricsFile:
    """`metrics.csv`: one row per logged update or evaluation, never a row twice.

    Args:
        path: the file; created with the first row.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.columns: list[str] = list(FIRST)
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                self.columns = next(csv.reader(file), list(FIRST))

    def keep_until(self, update: int) -> None:
        """Drop the rows after an update, as those will be written again."""
        rows = [row for row in self.rows() if int(row["update"]) <= update]
        if self.path.exists():
            # Columns that only a dropped row had go too: the file is as if that row had never been.
            used = [
                name for name in self.columns if name in FIRST or any(row[name] for row in rows)
            ]
            self._rewrite(rows, used)

    def rows(self) -> list[dict[str, str]]:
        """Return the rows written so far; a torn last line is left out."""
        if not self.path.exists():
            return []
        text = self.path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        return list(csv.DictReader(io.StringIO(whole, newline="")))

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a row; a new column rewrites the file, and comes with its first value."""
        row = {name: value for name, value in row.items() if value is not None}
        new = [name for name in row if name not in self.columns]
        if new:
            self._rewrite(self.rows(), [*self.columns, *new])
        fresh = not self.path.exists()
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns, lineterminator="\n")
            if fresh:
                writer.writeheader()
            writer.writerow(row)

    def _rewrite(self, rows: list[dict[str, str]], columns: list[str]) -> None:
        self.columns = columns
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, columns, lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
        write_text(self.path, text.getvalue())


class Trackers:
    """TensorBoard and Weights & Biases, as far as the settings ask for them; rank 0 only.

    Args:
        run: the run whose folder takes the event files.
        update: rows after this update are about to be written again.

    Raises:
        UserError: if wandb is asked for and not installed.
    """

    def __init__(self, run: "Run[Any]", update: int) -> None:
        self.running: list[GeneralTracker] = []
        if not run.is_main:
            return
        from accelerate.tracking import TensorBoardTracker, WandBTracker

        if run.settings.train.tensorboard:
            self.running.append(
                TensorBoardTracker("tensorboard", run.folder, purge_step=update + 1)
            )
        if run.settings.train.wandb:
            if importlib.util.find_spec("wandb") is None:
                raise UserError("wandb is not installed", "pip install 'moectl[wandb]'")
            self.running.append(WandBTracker(**_wandb(run)))
        for tracker in self.running:
            tracker.start()

    def log(self, row: Mapping[str, float | None], update: int) -> None:
        """Send the values of one row."""
        values = {name: value for name, value in row.items() if value is not None}
        for tracker in self.running:
            tracker.log(values, step=update)

    def close(self) -> None:
        """Flush and end."""
        for tracker in self.running:
            tracker.finish()
        self.running = []


def _wandb(run: "Run[Any]") -> dict[str, Any]:
    """Return where Weights & Biases takes a run to; a resumed run goes on there."""
    train = run.settings.train
    return {
        "run_name": train.wandb_project or f"moectl-{run.record['room']}",  # wandb's project
        "entity": train.wandb_entity or None,
        "name": train.wandb_name or run.folder.name,
        "id": run.record["id"],
        "dir": str(run.folder),
        "resume": "allow",
    }


def loads_or_none(path: Path) -> Any:
    """Read a JSON file; None if it is missing or torn."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
