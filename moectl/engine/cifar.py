"""The official CIFAR files.

Letters: N images.
"""

import logging
from pathlib import Path
from typing import Any, Literal

from moectl.engine.errors import UserError
from moectl.engine.launch import offline

log = logging.getLogger(__name__)


def read_cifar(name: Literal["cifar10", "cifar100"], root: Path, *, download: bool) -> list[Any]:
    """Return torchvision's training and test set, after a download if need be.

    Each has `data` (N, 32, 32, 3) uint8, `targets` and `classes`.

    Args:
        name: which.
        root: folder of their folder.
        download: fetch what is missing, where MOECTL_OFFLINE does not forbid it.

    Raises:
        UserError: naming the files that are missing or not the official ones.
    """
    from torchvision import datasets

    kind = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    folder = root / kind.base_folder
    files = [name for name, _ in kind.train_list + kind.test_list] + [kind.meta["filename"]]
    missing = [name for name in files if not (folder / name).is_file()]
    if missing and (not download or offline()):
        raise UserError(
            f"{folder}: {', '.join(missing)} not found",
            f"put the files of {kind.url} there, or allow the download"
            " (data.download = true, no MOECTL_OFFLINE)",
        )
    if missing:
        log.warning("downloading %s to %s", kind.url, root)
    try:
        return [kind(root, train=part, download=bool(missing)) for part in (True, False)]
    except (OSError, RuntimeError) as error:
        reason = f"could not be downloaded ({error})" if missing else "are not the official files"
        raise UserError(
            f"{folder}: {', '.join(missing or files)} {reason}",
            f"put the files of {kind.url} there",
        ) from None
