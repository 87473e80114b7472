import pytest
import torch

from moectl.common.precision import without_autocast


def test_numbers_stay_wide_within_autocast() -> None:
    x = torch.randn(4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
        with without_autocast(x.device.type):
            assert (x @ x).dtype == torch.float32
        assert (x @ x).dtype == torch.bfloat16


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_every_device_is_taken(device: str) -> None:
    x = torch.ones(2, 2, device=device)
    with without_autocast(x.device.type):
        assert (x @ x).shape == (2, 2)
