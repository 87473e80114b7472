import torch
from torch import Tensor, nn

from moectl.common.arithmetic import traced_outputs


class Split(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 2, 3, stride=2), nn.BatchNorm2d(2), nn.Dropout())
        self.split = Split()

    def forward(self, images: Tensor) -> Tensor:
        return self.split(self.body(images))[0]


def test_every_module_with_one_tensor_is_told_in_its_order() -> None:
    told: list[tuple[str, str, tuple[int, ...]]] = []
    model = Net().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    traced_outputs(
        model,
        9,
        lambda name, module, output: told.append(
            (name, type(module).__name__, tuple(output.shape))
        ),
    )
    shape = (1, 2, 4, 4)
    assert told == [
        ("body.0", "Conv2d", shape),
        ("body.1", "BatchNorm2d", shape),
        ("body.2", "Dropout", shape),
        ("body", "Sequential", shape),
        ("", "Net", shape),
    ]
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
