"""A tiny system trained through the real engine, in the test or as a program of its own."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from moectl.engine.sections import OptimSection, ScheduleSection, TrainSection
from moectl.engine.settings import Settings


class ToySettings(Settings):
    """Settings of the toy system."""

    model_config = SettingsConfigDict(env_prefix="MOECTL_TOY__")

    optim: OptimSection = OptimSection(lr=0.05, momentum=0.9, nesterov=True)
    schedule: ScheduleSection = ScheduleSection(name="multistep", warmup=2, step1=3, step2=4)
    train: TrainSection = Field(
        default=TrainSection(
            epochs=4, batch_size=8, precision="no", log_every=2, tensorboard=False, threads=1
        )
    )


def settings(**changes: Any) -> ToySettings:
    tree = ToySettings().model_dump()
    for key, value in changes.items():
        section, name = key.split("__")
        tree[section][name] = value
    return ToySettings(**tree)


def source(samples: int = 30) -> Any:
    """Random images with a noisy augmentation, so that data order and draws matter."""
    import torch

    from moectl.engine.sources import TensorSource

    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (samples, 3, 4, 4), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 3, (samples,), generator=generator)

    class Noise:
        draws = 2

        def __call__(self, batch: Any, uniforms: Any) -> Any:
            return batch / 255 + uniforms[:, :1, None, None]

    return TensorSource(images, labels, Noise(), lambda batch: batch / 255)


def model() -> Any:
    """Batch norm and dropout: state and randomness that a sloppy resume would lose."""
    from torch import nn

    from moectl.engine.seeding import seed_all

    seed_all(7, "init")
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(16, 3),
    )


def train(run: Any, on_step: Any = lambda step, loss: loss) -> Any:
    """The whole procedure; `on_step` may change the loss or do harm."""
    from torch.nn import functional as F

    from moectl.engine.optim import build_optimizer, build_schedule

    net = model()
    options = run.settings
    schedule = build_schedule(options.schedule, options.optim.lr, options.train.epochs)
    optimizer = build_optimizer(options.optim, net.parameters())
    loop = run.loop(net, source(), optimizer, schedule, monitor="val/score")
    for step in loop:
        images, labels = step.batch
        loss = on_step(step, F.cross_entropy(loop.model(images), labels))
        step.update(loss, double=2 * loss.detach())
        if step.ends_epoch:
            step.score(
                {"val/score": -float(loss.detach()) if loop.accelerator.num_processes == 1 else 1.0}
            )
    return loop


def open_run(folder: Path, options: ToySettings, *, resume: str = "") -> Any:
    from moectl.engine import run
    from moectl.engine.launch import build_accelerator

    accelerator = build_accelerator(options.train, cpu=True)
    if resume:
        return run.reopen(folder, options, accelerator, auto=resume == "auto")
    return run.create(
        options, accelerator, room="toy", command="train", name="toy", out=folder, origin={}
    )


def main() -> None:
    """`python toy.py FOLDER [resume=auto] [kill=N | term=N | hang=N] [section__key=value …]`."""
    folder, words = Path(sys.argv[1]), dict(word.split("=") for word in sys.argv[2:])
    resume = words.pop("resume", "")
    faults = {
        name: int(words.pop(name))
        for name in ("kill", "term", "int", "usr1", "slow")
        if name in words
    }
    options = settings(**words)

    def harm(step: Any, loss: Any) -> Any:
        numbers = {
            "term": signal.SIGTERM,
            "int": signal.SIGINT,
            "usr1": signal.SIGUSR1,
            "kill": signal.SIGKILL,
        }
        rank = os.environ.get("RANK", "0")
        for name, number in numbers.items():
            # In two processes only the second is told: all must stop at the same update.
            if faults.get(name) == step.index and rank == os.environ.get("HARM_RANK", "0"):
                os.kill(os.getpid(), number)
        return loss

    from moectl.engine import console
    from moectl.engine.errors import Interrupted, RunFailed, UserError

    console.setup()
    try:
        with open_run(folder, options, resume=resume) as run:
            train(run, harm)
    except Interrupted:
        sys.exit(75)
    except RunFailed as error:
        console.error(str(error))
        sys.exit(1)
    except UserError as error:
        console.error(error.message, error.hint)
        sys.exit(2)


if __name__ == "__main__":
    main()
