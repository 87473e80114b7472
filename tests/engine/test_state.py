"""The training state as bytes and back."""

import io
import json
from typing import Any

import pytest
import torch
from torch import nn

from moectl.engine import state
from moectl.engine.checkpoint import Streamed
from moectl.engine.errors import UserError


def packed(*given: Any) -> dict[str, bytes]:
    """The files of `pack` as bytes."""
    found = {}
    for name, content in state.pack(*given).items():
        if isinstance(content, Streamed):
            buffer = io.BytesIO()
            content.write(buffer)
            assert 0 <= content.size <= len(buffer.getvalue())
            found[name] = buffer.getvalue()
        else:
            found[name] = content
    return found


def trained(steps: int, name: str = "SGD", **options: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    optimizer = getattr(torch.optim, name)(net.parameters(), lr=0.1, **options)
    for _ in range(steps):
        net(torch.rand(5, 3)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return net, optimizer


@pytest.mark.parametrize(("name", "options"), [("SGD", {"momentum": 0.9}), ("AdamW", {})])
def test_what_is_packed_is_unpacked(name: str, options: dict[str, Any]) -> None:
    net, optimizer = trained(3, name, **options)
    position = {"update": 3, "best": {"value": 0.1 + 0.2}}
    tracked = {"average": nn.Linear(1, 1)}
    files = packed(net, optimizer, None, tracked, position)
    other, fresh = trained(0, name, **options)
    found, objects = state.unpack(files, "here", other, fresh, None)
    assert found == position
    assert objects["average"].keys() == {"weight", "bias"}
    for key, value in net.state_dict().items():
        assert torch.equal(other.state_dict()[key], value)
    again = packed(other, fresh, None, tracked, position)
    assert again == files, "the same state gives the same bytes"


def test_an_optimizer_that_has_not_stepped_is_a_state_too() -> None:
    net, optimizer = trained(0)
    files = packed(net, optimizer, None, {}, {})
    assert state.unpack(files, "here", *trained(2), None) == ({}, {})


def test_the_scaler_goes_along() -> None:
    class Scaler:
        scale = 2.0

        def state_dict(self) -> dict[str, float]:
            return {"scale": self.scale}

        def load_state_dict(self, found: dict[str, float]) -> None:
            self.scale = found["scale"]

    first, second = Scaler(), Scaler()
    first.scale = 1024.0
    files = packed(*trained(1), first, {}, {})
    state.unpack(files, "here", *trained(0), second)
    assert second.scale == 1024.0
    state.unpack(packed(*trained(1), None, {}, {}), "here", *trained(0), second)
    assert second.scale == 1024.0


def test_layers_under_two_names_are_packed_twice() -> None:
    shared = nn.Linear(2, 2)
    net = nn.ModuleDict({"a": shared, "b": shared})
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    files = packed(net, optimizer, None, {}, {})
    with torch.no_grad():
        shared.weight.zero_()
    state.unpack(files, "here", net, optimizer, None)
    assert net["a"].weight is net["b"].weight
    assert bool(shared.weight.any())


class Payload:
    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return (print, ("ran",))


def test_code_in_the_optimizer_file_never_runs(capsys: pytest.CaptureFixture[str]) -> None:
    net, optimizer = trained(1)
    files = packed(net, optimizer, None, {}, {})
    buffer = io.BytesIO()
    torch.save({"optimizer": Payload()}, buffer)
    with pytest.raises(UserError, match=r"here/optimizer\.pt: holds more than tensors"):
        state.unpack({**files, "optimizer.pt": buffer.getvalue()}, "here", net, optimizer, None)
    assert capsys.readouterr().out == ""


def test_position_is_json() -> None:
    files = packed(*trained(0), None, {}, {"update": 1})
    assert json.loads(files["loop.json"]) == {"update": 1}
