"""The size of a training, for `--dry-run`."""

from typing import Any


def size(settings: Any) -> dict[str, Any]:
    """Return the number of updates and executions of a training."""
    data, train, group = settings.data, settings.train, settings.grpo.group_size
    updates = -(-data.train_samples // train.batch_size) * train.epochs
    per_epoch = data.train_samples * group + data.val_samples
    return {
        "updates": updates,
        "executions per epoch": per_epoch,
        "executions at most": per_epoch * train.epochs,
    }
