"""The commands of taskmoe."""

from moectl.engine import console
from moectl.engine.command import Request, command, open_run
from moectl.taskmoe.settings import TaskmoeSettings


@command(
    TaskmoeSettings,
    ("data", "model", "specialist", "optim", "schedule", "train"),
    train=True,
)
def specialist(request: Request) -> None:
    """Train one of the specialists."""
    from moectl.taskmoe.specialist import train_specialist

    with open_run(request) as run:
        train_specialist(run.settings, run)
    console.result({**run.record, "folder": str(run.folder)}, str(run.folder))
