"""How far apart two sets of features are.

Letters: N, M images of either set, D features, K neighbours.
"""

import warnings

import torch
from torch import Tensor, nn

from moectl.engine.seeding import key

_CHUNK = 512  # rows of distances at a time
_SAME = 1e-6  # of the largest norm: nearer points are one, their distance is rounding
_COMPARABLE = 10_000  # images of a score by Inception that others may be compared with


class _Given(nn.Module):
    """Stands where torchmetrics expects a network: its images are the features already."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.num_features = features

    def forward(self, features: Tensor) -> Tensor:
        """Return them as they are."""
        return features


def frechet(real: Tensor, fake: Tensor) -> float:
    """Return the Fréchet distance of two Gaussians with the sets' means and covariances.

    Zero if those are equal. It is never to be compared between different numbers of images: it
    falls as they grow.

    Args:
        real: (N, D).
        fake: (M, D).

    Raises:
        ValueError: if a set has fewer than 2 rows, or holds other than finite numbers.

    Source: Heusel et al. 2017.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    real, fake = _centred(*_checked(real, fake, 2))
    # Every process holds all features: there is nothing to collect from the others.
    metric = FrechetInceptionDistance(_Given(real.shape[1]), sync_on_compute=False)
    metric.set_dtype(torch.float64)
    metric.update(real, real=True)
    metric.update(fake, real=False)
    return max(0.0, float(metric.compute()))


def kernel(
    real: Tensor, fake: Tensor, *, subsets: int = 100, size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Return mean and standard deviation of the kernel distance over random subsets.

    Unbiased: its mean does not depend on the number of images, and may be negative.

    Args:
        real: (N, D).
        fake: (M, D).
        subsets: how many are drawn.
        size: of a subset; cut to the smaller set.
        seed: of the draws.

    Raises:
        ValueError: if a set has fewer than 2 rows, or holds other than finite numbers.

    Source: Bińkowski et al. 2018.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    real, fake = _checked(real, fake, 2)
    size = min(size, len(real), len(fake))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Metric `Kernel Inception Distance` will save all")
        metric = KernelInceptionDistance(
            _Given(real.shape[1]), subsets=subsets, subset_size=size, sync_on_compute=False
        )
    metric.set_dtype(torch.float64)
    metric.update(real, real=True)
    metric.update(fake, real=False)
    with torch.random.fork_rng(devices=[]):
        # `torch.manual_seed` would reach accelerators too, which are not put back.
        torch.default_generator.manual_seed(key(seed, "kernel"))
        mean, spread = metric.compute()
    return float(mean), float(spread)


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> tuple[float, float]:
    """Return the share of fake images near real ones, and of real images near fake ones.

    An image is near a set if it lies in the ball of one of the set's images, which reaches to that
    image's k-th neighbour in its own set. Bad images lower precision, missing ones recall.

    Args:
        real: (N, D).
        fake: (M, D).
        k: which neighbour.

    Raises:
        ValueError: if a set has no more than k rows, or holds other than finite numbers.

    Source: Kynkäänniemi et al. 2019.
    """
    if k < 1:
        raise ValueError(f"k = {k}: expected 1 or more")
    real, fake = _centred(*_checked(real, fake, k + 1))
    return _covered(fake, real, k), _covered(real, fake, k)


def too_few(count: int, features: int, *, inception: bool = False) -> str:
    """Return a warning about a Fréchet distance of so many images; empty if there are enough.

    Args:
        count: images of the smaller set.
        features: D.
        inception: whether the score could be taken for one of the literature.
    """
    if count <= features:
        return (
            f"{count} images are too few for {features} features: the covariance is singular below"
            f" {features + 1}, and the Fréchet distance says little"
        )
    if inception and count < _COMPARABLE:
        return (
            f"{count} images, fewer than {_COMPARABLE}: the Fréchet distance is biased upwards;"
            " never compare it with one of another number of images"
        )
    return ""


def _checked(real: Tensor, fake: Tensor, least: int) -> tuple[Tensor, Tensor]:
    """Return both sets in float64."""
    for name, part in (("real", real), ("fake", fake)):
        if part.ndim != 2 or part.shape[1] != real.shape[1]:
            raise ValueError(f"{name} features of shape {tuple(part.shape)}: expected (N, D)")
        if len(part) < least:
            raise ValueError(f"{len(part)} {name} images: expected {least} or more")
        if not part.isfinite().all():
            raise ValueError(f"{name} features hold other than finite numbers")
    return real.double(), fake.double()


def _centred(real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    """Shift both sets alike: distances of points stay as they are, and sums round less."""
    centre = real.mean(0)
    return real - centre, fake - centre


def _covered(points: Tensor, others: Tensor, k: int) -> float:
    """Return the share of points (N, D) that lie in a ball of others (M, D)."""
    same = _SAME * float(torch.cat((points, others)).norm(dim=1).max())
    # The nearest of its own set is the point itself.
    radii = torch.cat([_apart(part, others, same).kthvalue(k + 1).values for part in _cut(others)])
    inside = [(_apart(part, others, same) <= radii).any(1) for part in _cut(points)]
    return float(torch.cat(inside).double().mean())


def _cut(rows: Tensor) -> tuple[Tensor, ...]:
    return torch.split(rows, _CHUNK)


def _apart(points: Tensor, others: Tensor, same: float) -> Tensor:
    """Return distances (N, M); through a product of matrices, ten times as fast as differences."""
    distances = torch.cdist(points, others, compute_mode="use_mm_for_euclid_dist")
    return distances.where(distances > same, 0.0)
