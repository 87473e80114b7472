"""The commands of controller."""

from typing import Any

from moectl.controller.settings import ControllerSettings
from moectl.engine import console
from moectl.engine.command import Request, command, open_run


def _size(settings: Any) -> dict[str, Any]:
    from moectl.controller.size import size

    return size(settings)


_ASKED = ("data", "backbone", "latency")
_DROPPED = {
    "--results-dir": "use --out DIR, or --name; nothing was read from that folder",
    "--use-multi-gpu": "start it as: accelerate launch -m moectl controller grpo …",
}


@command(ControllerSettings, (*_ASKED, "profile"), train=True)
def profile(request: Request) -> None:
    """Measure blocks, plans and latency of a network."""
    from moectl.controller.profile import run_profile

    with open_run(request) as run:
        document = run_profile(run)
    console.result(document, str(run.folder))


@command(
    ControllerSettings,
    (*_ASKED, "policy", "budget", "reward", "grpo", "optim", "train"),
    train=True,
    size=_size,
    dropped=_DROPPED,
)
def grpo(request: Request) -> None:
    """Train the controller on answers of a frozen network."""
    from moectl.controller.train import train

    with open_run(request) as run:
        train(run.settings, run)
    console.result({**run.record, "folder": str(run.folder)}, str(run.folder))
