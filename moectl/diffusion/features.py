"""What images are compared by: features of a classifier, or of Inception.

Letters: B, N images, C channels, S pixels of a side, D features.
"""

import io
import logging
import math
from collections.abc import Callable, Mapping
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moectl.common.images import Plain, Standard
from moectl.engine import artefact
from moectl.engine.errors import RunFailed, UserError
from moectl.engine.files import is_file, read_bytes, sha256
from moectl.engine.inference import predict
from moectl.engine.launch import agree, offline
from moectl.engine.seeding import key
from moectl.engine.sources import Source, Stream, TensorSource

if TYPE_CHECKING:
    from accelerate import Accelerator

    from moectl.diffusion.data import Data

log = logging.getLogger(__name__)

_WIDTHS = (32, 64, 128)
_RECIPE = 1  # a kept classifier of another one is trained again
_BATCH, _EPOCHS, _LR, _DECAY = 64, 12, 2e-3, 0.01
_FEWEST, _MOST = 600, 4000  # updates
_KEPT = 20_000  # images held in memory
_HALF = (0.5, 0.5, 0.5)
_INCEPTION = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth"
)
_OFFICIAL = "6726825d"  # how the SHA-256 of that file begins


class Classifier(nn.Module):
    """A small classifier of images in -1 to 1, of any side from 8.

    Args:
        classes: K.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        stages: list[nn.Module] = []
        for before, width in zip((3, *_WIDTHS), _WIDTHS, strict=False):
            stages += [
                nn.Conv2d(before, width, 3, stride=1 if before == 3 else 2, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
            ]
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(_WIDTHS[-1], classes)

    def features(self, images: Tensor) -> Tensor:
        """Map images (B, 3, S, S) to features (B, 128)."""
        return self.stages(images).mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, 3, S, S) to logits (B, K)."""
        return self.head(self.features(images))


def trained_classifier(
    data: "Data", accelerator: "Accelerator", cache: Path
) -> tuple[Classifier, str]:
    """Return a classifier of these classes, trained the first time and read from disk after that.

    The training depends on the data alone, and leaves global generators as they are.

    Args:
        data: it learns the training images and is tested on the others.
        accelerator: devices and processes; the first process trains.
        cache: folder where it is kept.

    Returns:
        The network in evaluation mode on the device, and the first 8 digits of its file's SHA-256.

    Raises:
        UserError: if there is but one class, or the folder cannot be written.
    """
    if len(data.class_names) < 2:
        raise UserError(
            f"{data.facts['dataset']}: one class, of which a classifier learns nothing",
            "--features inception, or none",
        )
    path = cache / f"classifier-{data.facts['digest']}.pth"
    facts = {
        "model": "Classifier",
        "arguments": {"classes": len(data.class_names)},
        "classes": data.class_names,
        "image_size": data.facts["image_size"],
        "recipe": _RECIPE,
    }
    agree(accelerator, lambda: _is_kept(path, facts) or _keep(path, facts, data, accelerator))
    kept = artefact.load(path)
    model = _untrained(len(data.class_names))
    model.load_state_dict(kept.payload["state_dict"])
    return model.requires_grad_(False).eval().to(accelerator.device), kept.sha256[:8]


def inception(weights: Path | None) -> nn.Module:
    """Return Inception-v3 in the form that FID is defined by: bytes (B, 3, S, S) to (B, 2048).

    Args:
        weights: its file; None takes that of torch's hub, from the cache or by a download.

    Raises:
        UserError: if the library or the weights are missing, or these are another network's.
    """
    try:
        import torch_fidelity  # type: ignore[import-not-found,unused-ignore]  # noqa: F401
    except ImportError:
        raise UserError(
            "features of Inception need torch-fidelity, which is not installed",
            "pip install 'moectl[fid]'",
        ) from None
    from torchmetrics.image.fid import NoTrainInceptionV3

    path = weights or _hub_file()
    # The library unpickles whatever it is given: it sees a copy of the tensors alone.
    copy = io.BytesIO()
    torch.save(_tensors(path), copy)
    copy.seek(0)
    try:
        with torch.random.fork_rng(devices=[]):
            return NoTrainInceptionV3(
                "inception-v3-compat", ["2048"], cast("str", copy), antialias=True
            )
    except RuntimeError:
        raise UserError(
            f"{path}: not the weights of Inception-v3 in the form of FID",
            f"expected a file such as {_INCEPTION}",
        ) from None


def extract(
    give: Callable[[Tensor], Tensor],
    source: Source,
    accelerator: "Accelerator",
    *,
    batch_size: int,
    limit: int = 0,
) -> tuple[Tensor, Tensor]:
    """Return features (N, D) float64 and labels (N,) of a data set, in order, on the CPU.

    Args:
        give: from images (B, 3, S, S) in -1 to 1 to features (B, D), on the device.
        source: the data; dealt out over all processes.
        accelerator: devices and processes.
        batch_size: images of a process at a time.
        limit: the first so many images; 0 takes all.
    """
    total = min(limit, len(source)) if limit else len(source)
    batches = math.ceil(total / (batch_size * accelerator.num_processes))
    features, labels = predict(
        lambda images: _features(give, images), source, accelerator, batch_size, batches
    )
    return features[:total].double(), labels[:total]


@torch.no_grad()
def extract_images(
    give: Callable[[Tensor], Tensor], images: Tensor, batch_size: int, device: torch.device
) -> Tensor:
    """Return features (N, D) float64 on the CPU of generated images (N, 3, S, S) in -1 to 1.

    Raises:
        RunFailed: if an image holds other than finite numbers.
    """
    if not images.isfinite().all():
        raise RunFailed("generated images hold other than finite numbers: the network has diverged")
    parts = [_features(give, part.to(device)).cpu() for part in torch.split(images, batch_size)]
    return torch.cat(parts).double()


def to_bytes(images: Tensor) -> Tensor:
    """Map values of -1 to 1 to the nearest of 256 levels, uint8; others to the ends."""
    return ((images.float() + 1) * 127.5 + 0.5).clamp_(0, 255).to(torch.uint8)


def quantised(images: Tensor) -> Tensor:
    """Bring values of -1 to 1 to the 256 levels that a file can hold."""
    return to_bytes(images).float() / 127.5 - 1


def _features(give: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Real and generated images take the same way: as bytes, in fp32."""
    with torch.autocast(images.device.type, enabled=False):
        return give(quantised(images)).float()


def _is_kept(path: Path, facts: Mapping[str, Any]) -> bool:
    """Whether a file holds that classifier, whole."""
    if not is_file(path):
        return False
    try:
        kept = artefact.load(path)
    except UserError as error:
        log.warning("%s; the classifier is trained again", error)
        return False
    return all(kept.facts.get(name) == value for name, value in facts.items())


def _keep(path: Path, facts: Mapping[str, Any], data: "Data", accelerator: "Accelerator") -> bool:
    """Train the classifier and write it."""
    log.info("training a classifier of %s for its features, once", data.facts["dataset"])
    device, classes = accelerator.device, len(data.class_names)
    model = _train(*_held(data.train, classes, device), classes)
    images, labels = _held(data.test, classes, device)
    accuracy = _accuracy(model, images, labels)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        artefact.save(
            path, {"state_dict": model.state_dict()}, {**facts, "test_accuracy": accuracy}
        )
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
    log.info("%s: %.1f%% of %d held-out images right", path, 100 * accuracy, len(labels))
    return True


def _held(source: Source, classes: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return bytes (N, 3, S, S) and labels of evenly spread images, all of them if not too many."""
    # Classes may come one after the other or in turn: such a step meets all of them in both.
    least = math.ceil(len(source) / _KEPT)
    step = next(step for step in count(least) if math.gcd(step, classes) == 1)
    parts = [(to_bytes(images), labels) for images, labels in source.ordered(256, device, 0, step)]
    images, labels = zip(*parts, strict=True)
    return torch.cat(images), torch.cat(labels)


def _untrained(classes: int) -> Classifier:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(key("classifier"))
        return Classifier(classes)


@torch.enable_grad()
def _train(images: Tensor, labels: Tensor, classes: int) -> Classifier:
    """Train a classifier of bytes (N, 3, S, S) that are moved a little."""
    model = _untrained(classes).to(images.device)
    stream = Stream(len(images), min(_BATCH, len(images)), seed=0)
    per_epoch = stream.batches_per_epoch
    updates = min(max(_EPOCHS * per_epoch, _FEWEST), _MOST)
    moved = Standard(_HALF, _HALF, degrees=0, padding=max(1, images.shape[-1] // 16), flip=False)
    source = TensorSource(images, labels, moved, Plain(_HALF, _HALF))
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LR, weight_decay=_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    chunks = stream.chunks(0, 0, math.ceil(updates / per_epoch))
    for batch, truth in islice(source.batches(chunks, 0, images.device), updates):
        optimizer.zero_grad()
        torch.autograd.backward(F.cross_entropy(model(batch), truth))
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def _accuracy(model: Classifier, images: Tensor, labels: Tensor) -> float:
    plain = Plain(_HALF, _HALF)
    right = [
        (model(plain(part)).argmax(1) == truth).float()
        for part, truth in zip(torch.split(images, 256), torch.split(labels, 256), strict=True)
    ]
    return float(torch.cat(right).mean())


def _hub_file() -> Path:
    """Return the published weights, from torch's cache or by a download."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(_INCEPTION).name
    if path.is_file():
        return path
    hint = f"put {_INCEPTION} there, or give the path of such a file"
    if offline():
        raise UserError(f"{path} not found, and MOECTL_OFFLINE forbids the download", hint)
    log.warning("downloading %s to %s", _INCEPTION, path.parent)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(_INCEPTION, str(path), _OFFICIAL, progress=False)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path}: could not be downloaded ({error})", hint) from None
    return path


def _tensors(path: Path) -> dict[str, Tensor]:
    """Read a state dict without running code from it."""
    data = read_bytes(path)
    state = artefact.safe_load(data, str(path))
    if not isinstance(state, Mapping):
        raise UserError(f"{path}: holds a {type(state).__name__}, expected a dictionary of weights")
    if not sha256(data).startswith(_OFFICIAL):
        log.warning(
            "%s: not the published weights; scores do not compare with published ones", path
        )
    return {str(name): value for name, value in state.items() if isinstance(value, Tensor)}
