"""Distances of features: known answers, other formulas, plain loops, limits."""

import warnings

import numpy as np
import pytest
import torch
from torch import Tensor

from moectl.diffusion.distances import frechet, kernel, precision_recall, too_few


def normal(count: int, features: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, features, generator=generator, dtype=torch.float64)


def exactly(mean: list[float], covariance: list[list[float]], count: int = 50) -> Tensor:
    """Samples whose mean and covariance (divided by n - 1) are these to rounding."""
    raw = normal(count, len(mean))
    raw = raw - raw.mean(0)
    white = raw @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(raw.T))).T
    root = torch.linalg.cholesky(torch.tensor(covariance, dtype=torch.float64))
    return white @ root.T + torch.tensor(mean, dtype=torch.float64)


def by_scipy(real: Tensor, fake: Tensor) -> float:
    from scipy.linalg import sqrtm

    one, two = np.cov(real.numpy().T), np.cov(fake.numpy().T)
    apart = real.numpy().mean(0) - fake.numpy().mean(0)
    return float(apart @ apart + np.trace(one + two - 2 * sqrtm(one @ two).real))


def by_loops(real: Tensor, fake: Tensor, k: int) -> tuple[float, float]:
    def share(points: list[list[float]], others: list[list[float]]) -> float:
        radii = []
        for i, one in enumerate(others):
            rest = [two for j, two in enumerate(others) if j != i]
            radii.append(sorted(np.hypot.reduce(np.subtract(one, two)) for two in rest)[k - 1])
        inside = 0
        for point in points:
            away = [np.hypot.reduce(np.subtract(point, other)) for other in others]
            inside += any(a <= r for a, r in zip(away, radii, strict=True))
        return inside / len(points)

    return share(fake.tolist(), real.tolist()), share(real.tolist(), fake.tolist())


def test_frechet_of_two_gaussians_is_the_known_number() -> None:
    real = exactly([0, 0], [[2, 1], [1, 2]])
    fake = exactly([1, -2], [[1, 0], [0, 3]])
    assert frechet(real, fake) == pytest.approx(5.5166852264, abs=1e-9)
    assert frechet(fake, real) == pytest.approx(5.5166852264, abs=1e-9)


@pytest.mark.parametrize("features", [2, 4, 16])
def test_frechet_of_a_doubled_gaussian_is_the_dimension(features: int) -> None:
    unit = exactly([0.0] * features, torch.eye(features).tolist())
    assert frechet(unit, 2 * unit) == pytest.approx(features, abs=1e-9)


def test_frechet_of_equal_sets_is_zero() -> None:
    real = normal(60, 8)
    assert frechet(real, real) == pytest.approx(0, abs=1e-6)
    assert frechet(real, real.flip(0)) == pytest.approx(0, abs=1e-6)


def test_frechet_agrees_with_the_square_root_of_a_matrix() -> None:
    real = normal(200, 12, 1) @ normal(12, 12, 2)
    fake = normal(150, 12, 3) @ normal(12, 12, 4) + normal(1, 12, 5)
    assert frechet(real, fake) == pytest.approx(by_scipy(real, fake), rel=1e-9)


def test_frechet_keeps_its_digits_far_from_the_origin() -> None:
    real, fake = normal(100, 6, 1), 1.5 * normal(100, 6, 2)
    assert frechet(real + 1e5, fake + 1e5) == pytest.approx(frechet(real, fake), rel=1e-7)


def test_frechet_takes_singular_covariances_and_single_precision() -> None:
    value = frechet(normal(5, 20, 1).float(), normal(5, 20, 2).float())
    assert value > 0


def test_kernel_of_two_triples_is_the_known_number() -> None:
    real = torch.tensor([[0.0, 0], [1, 0], [0, 1]])
    fake = torch.tensor([[1.0, 1], [2, 1], [1, 2]])
    mean, spread = kernel(real, fake, subsets=5)
    assert mean == pytest.approx(13.1944444, abs=1e-6)
    assert spread == pytest.approx(0, abs=1e-9)


def test_kernel_over_whole_sets_is_the_plain_sum() -> None:
    real, fake = normal(20, 5, 1), normal(20, 5, 2) + 1
    total = 0.0
    for i in range(20):
        for j in range(20):
            if i != j:
                for part in (real, fake):
                    total += float(part[i] @ part[j] / 5 + 1) ** 3 / (20 * 19)
            total -= 2 * float(real[i] @ fake[j] / 5 + 1) ** 3 / 400
    assert kernel(real, fake, subsets=2)[0] == pytest.approx(total, rel=1e-9)


def test_kernel_draws_from_its_seed_alone() -> None:
    real, fake = normal(60, 4, 1), normal(80, 4, 2) + 0.5
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = kernel(real, fake, subsets=10, size=20)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(2)
    assert kernel(real, fake, subsets=10, size=20) == first
    assert kernel(real, fake, subsets=10, size=20, seed=1) != first
    assert first[1] > 0


def test_kernel_is_about_zero_for_sets_of_one_distribution() -> None:
    mean, spread = kernel(normal(400, 8, 1), normal(400, 8, 2), subsets=50, size=100)
    assert abs(mean) < 2 * spread
    assert kernel(normal(400, 8, 1), normal(400, 8, 2) + 1, subsets=50, size=100)[0] > 5 * spread


def test_kernel_leaves_other_warnings_alone() -> None:
    kernel(normal(4, 2), normal(4, 2), subsets=1)
    with pytest.raises(UserWarning, match="still raised"):
        warnings.warn("still raised", UserWarning, stacklevel=1)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_agree_with_plain_loops(
    k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moectl.diffusion.distances._CHUNK", 7)
    real, fake = normal(40, 3, 1), 0.7 * normal(30, 3, 2) + 1.2
    found = precision_recall(real, fake, k)
    assert found == pytest.approx(by_loops(real, fake, k), abs=1e-12)
    assert 0 < min(found) < max(found) < 1


def test_equal_sets_have_full_precision_and_recall() -> None:
    assert precision_recall(normal(50, 40), normal(50, 40)) == (1, 1)


def test_distant_sets_have_neither() -> None:
    assert precision_recall(normal(50, 4), normal(50, 4, 1) + 100) == (0, 0)


def test_one_image_over_and_over_is_precise_and_recalls_itself_alone() -> None:
    real = normal(50, 40) + 3
    assert precision_recall(real, real[7].repeat(30, 1)) == (1, 1 / 50)


def test_precision_and_recall_change_places_with_the_sets() -> None:
    real, fake = normal(40, 3, 1), 0.7 * normal(30, 3, 2) + 1.2
    assert precision_recall(real, fake) == precision_recall(fake, real)[::-1]


def test_sets_that_say_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="1 fake images: expected 2 or more"):
        frechet(normal(5, 2), normal(1, 2))
    with pytest.raises(ValueError, match="1 real images: expected 2 or more"):
        kernel(normal(1, 2), normal(5, 2))
    with pytest.raises(ValueError, match="3 real images: expected 4 or more"):
        precision_recall(normal(3, 2), normal(5, 2))
    with pytest.raises(ValueError, match="k = 0"):
        precision_recall(normal(5, 2), normal(5, 2), 0)
    with pytest.raises(ValueError, match=r"fake features of shape \(5, 3\)"):
        frechet(normal(5, 2), normal(5, 3))
    with pytest.raises(ValueError, match="fake features hold other than finite numbers"):
        frechet(normal(5, 2), normal(5, 2) / 0)


def test_warnings_of_few_images() -> None:
    assert "129" in too_few(128, 128)
    assert too_few(129, 128) == ""
    assert "2049" in too_few(2048, 2048, inception=True)
    assert "never compare" in too_few(9_999, 2048, inception=True)
    assert too_few(10_000, 2048, inception=True) == ""
    assert too_few(9_999, 128) == ""
