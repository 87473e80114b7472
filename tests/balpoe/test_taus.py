import math
import subprocess
import sys

import pytest

from moectl.balpoe.taus import tau_values


@pytest.mark.parametrize("tau_list", [[0, 1, 2], (0.0, 1.0, 2.0), "0;1;2", " 0; 1.0 ;2e0"])
def test_a_list_and_its_text_are_the_same(tau_list):
    assert tau_values(tau_list, 3, -9, 9) == (0.0, 1.0, 2.0)


@pytest.mark.parametrize(
    ("placing", "experts", "expected"),
    [
        ("limits", 1, [1]),
        ("limits", 3, [0, 1, 2]),
        ("limits", 7, [0, 1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2]),
        ("uniform", 1, [1]),
        ("uniform", 4, [0.25, 0.75, 1.25, 1.75]),
    ],
)
def test_limits_are_inclusive_and_uniform_takes_bin_centres(placing, experts, expected):
    assert tau_values(placing, experts, 0, 2) == pytest.approx(expected, abs=1e-12)


def test_limits_need_not_be_symmetric():
    assert tau_values("limits", 3, -1, 3) == (-1, 1, 3)


@pytest.mark.parametrize(
    ("tau_list", "experts", "tau_min", "tau_max", "message"),
    [
        ([0, 1], 3, 0, 2, "2 values for 3 experts"),
        ("0;1;2;3", 3, 0, 2, "4 values for 3 experts"),
        ("0;one;2", 3, 0, 2, "'0;one;2'"),
        ("", 1, 0, 2, "expected numbers"),
        ("limit", 3, 0, 2, "'limits'"),
        ([0, math.nan, 2], 3, 0, 2, "finite"),
        ("limits", 3, 2, 0, "tau_min = 2"),
        ("uniform", 3, 0, math.inf, "tau_max = inf"),
        ("limits", 3, math.nan, 2, "tau_min = nan"),
        ([], 0, 0, 2, "experts = 0"),
    ],
)
def test_what_does_not_fit_is_named(tau_list, experts, tau_min, tau_max, message):
    with pytest.raises(ValueError, match=message):
        tau_values(tau_list, experts, tau_min, tau_max)


def test_settings_can_use_it_without_torch():
    code = "import sys, moectl.balpoe.taus; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
