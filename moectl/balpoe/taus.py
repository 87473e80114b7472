"""The strength of the prior term of each expert, from what a user wrote."""

import math
from collections.abc import Sequence


def tau_values(
    tau_list: Sequence[float] | str, experts: int, tau_min: float, tau_max: float
) -> tuple[float, ...]:
    """Give every expert its tau; the mean is 1 when the ensemble aims at the uniform prior.

    Args:
        tau_list: numbers, one per expert; or the same as text, `"0;1;2"`; or `"limits"`, equal
            steps from `tau_min` to `tau_max` with both ends; or `"uniform"`, the centres of equal
            bins between them.
        experts: number of experts, at least 1.
        tau_min: lower end, read by `limits` and `uniform` only.
        tau_max: upper end, likewise.

    Raises:
        ValueError: naming the value that does not fit.

    Source: Sanchez Aimar et al. 2023.
    """
    if experts < 1:
        raise ValueError(f"experts = {experts}: at least 1 is needed")
    if tau_list in ("limits", "uniform"):
        return _spread(str(tau_list), experts, tau_min, tau_max)
    values = _numbers(tau_list)
    if len(values) != experts:
        raise ValueError(f"tau_list = {tau_list!r} has {len(values)} values for {experts} experts")
    if not all(map(math.isfinite, values)):
        raise ValueError(f"tau_list = {tau_list!r}: every value must be finite")
    return values


def _numbers(tau_list: Sequence[float] | str) -> tuple[float, ...]:
    parts = tau_list.split(";") if isinstance(tau_list, str) else tau_list
    try:
        return tuple(float(part) for part in parts)
    except ValueError:
        expected = "numbers such as '0;1;2', or 'limits', or 'uniform'"
        raise ValueError(f"tau_list = {tau_list!r}: expected {expected}") from None


def _spread(placing: str, experts: int, tau_min: float, tau_max: float) -> tuple[float, ...]:
    # Written so that NaN fails too.
    if not -math.inf < tau_min <= tau_max < math.inf:
        raise ValueError(f"tau_min = {tau_min} must not exceed tau_max = {tau_max}, both finite")
    if placing == "uniform" or experts == 1:  # one bin's centre is the midpoint
        shares = [(index + 0.5) / experts for index in range(experts)]
    else:
        shares = [index / (experts - 1) for index in range(experts)]
    return tuple(tau_min + (tau_max - tau_min) * share for share in shares)
