"""A tiny system trained through the real engine, in the test or as a program of its own."""

import csv
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from moectl.engine.launch import leave
from moectl.engine.sections import OptimSection, ScheduleSection, TrainSection
from moectl.engine.settings import Settings

EPOCHS, PER_EPOCH = 4, 4
UPDATES = EPOCHS * PER_EPOCH


class ToySettings(Settings):
    """Settings of the toy system."""

    model_config = SettingsConfigDict(env_prefix="MOECTL_TOY__")

    optim: OptimSection = OptimSection(lr=0.05, momentum=0.9, nesterov=True)
    schedule: ScheduleSection = ScheduleSection(name="multistep", warmup=2, step1=3, step2=4)
    train: TrainSection = Field(
        default=TrainSection(
            epochs=EPOCHS, batch_size=8, precision="no", log_every=2, tensorboard=False, threads=1
        )
    )


def settings(**changes: Any) -> ToySettings:
    tree = ToySettings().model_dump()
    for key, value in changes.items():
        section, name = key.split("__")
        tree[section][name] = value
    return ToySettings(**tree)


def source(samples: int = 30, workers: int | None = None) -> Any:
    """Random images with a noisy augmentation, so that data order and draws matter."""
    import torch

    from moectl.engine.sources import FolderSource, TensorSource

    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (samples, 3, 4, 4), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 3, (samples,), generator=generator)

    if workers is not None:  # as if each image were a file, named by its number
        items = [(str(row), int(label)) for row, label in enumerate(labels)]

        def plain(path: str) -> Any:
            return images[int(path)] / 255

        return FolderSource(items, lambda path: plain(path) + torch.rand(1), plain, workers)

    class Noise:
        draws = 2

        def __call__(self, batch: Any, uniforms: Any) -> Any:
            return batch / 255 + uniforms[:, :1, None, None]

    return TensorSource(images, labels, Noise(), lambda batch: batch / 255)


def model() -> Any:
    """Batch norm and dropout: state and randomness that a sloppy resume would lose."""
    import torch
    from torch import nn

    from moectl.engine.seeding import seed_all

    seed_all(7, "init")
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(16, 3),
    )
    net.register_buffer("ballast", torch.zeros(4096))  # so that a checkpoint outgrows small limits
    return net


class Average:
    """A moving average of the weights, as an object that the loop keeps."""

    def __init__(self, net: Any) -> None:
        self.values = {name: value.detach().clone() for name, value in net.named_parameters()}

    def follow(self, net: Any) -> None:
        for name, value in net.named_parameters():
            self.values[name].lerp_(value.detach(), 0.1)

    def state_dict(self) -> dict[str, Any]:
        return self.values

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.values = {name: value.clone() for name, value in state.items()}


def evaluate(loop: Any) -> float:
    """The mean negative loss over the plain images, collected from all processes."""
    import torch
    from torch.nn import functional as F

    from moectl.engine.launch import gather_rows

    accelerator, data = loop.accelerator, loop.source
    rank, world = accelerator.process_index, accelerator.num_processes
    net = loop.evaluating()
    with torch.no_grad():
        parts = data.ordered(8, accelerator.device, rank, world)
        losses = [F.cross_entropy(net(x), y, reduction="none") for x, y in parts]
    return -float(gather_rows(accelerator, torch.cat(losses), len(data)).mean())


def train(run: Any, on_step: Any = lambda _, loss: loss, net: Any = None, data: Any = None) -> Any:
    """The whole procedure; `on_step` may change the loss or do harm."""
    from torch.nn import functional as F

    from moectl.engine.optim import build_optimizer, build_schedule

    net = net or model()
    options = run.settings
    schedule = build_schedule(options.schedule, options.optim.lr, options.train.epochs)
    optimizer = build_optimizer(options.optim, net.parameters())
    loop = run.loop(net, data or source(), optimizer, schedule, monitor="val/score")
    average = Average(net)
    loop.track(average=average)
    for step in loop:
        images, labels = step.batch
        loss = on_step(step, F.cross_entropy(loop.model(images), labels))
        step.update(loss, double=2 * loss.detach())
        if step.ends_update:
            average.follow(net)
        if step.ends_epoch:
            step.score({"val/score": evaluate(loop)})
    return loop


def collect(samples: int) -> dict[str, Any]:
    """Outputs, labels and their mean over all processes, of a network that is exact."""
    from moectl.engine.inference import predict
    from moectl.engine.launch import build_accelerator

    def forward(images: Any) -> Any:
        return (images * 255).round().flatten(1)[:, :5]

    accelerator = build_accelerator(settings().train, cpu=True)
    outputs, labels = predict(forward, source(samples), accelerator, batch_size=2)
    found = {"outputs": outputs.tolist(), "labels": labels.tolist()}
    return {**found, "mean": outputs.mean().item()}


def open_run(folder: Path, options: ToySettings, *, resume: str = "") -> Any:
    from moectl.engine import run
    from moectl.engine.launch import build_accelerator

    accelerator = build_accelerator(options.train, cpu=True)
    if resume:
        return run.reopen(folder, options, accelerator, auto=resume == "auto")
    return run.create(
        options, accelerator, room="toy", command="train", name="toy", out=folder, origin={}
    )


def complete(folder: Path, *, resume: str = "", on_step: Any = None, **changes: Any) -> Any:
    """Train in this process and return the loop."""
    with open_run(folder, settings(**changes), resume=resume) as run:
        return train(run, on_step or (lambda _, loss: loss))


def stop_at(update: int, number: int = signal.SIGTERM) -> Callable[[Any, Any], Any]:
    """Send this process a signal during one update, counted from 1."""

    def harm(step: Any, loss: Any) -> Any:
        if step.index == update - 1:
            os.kill(os.getpid(), number)
        return loss

    return harm


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def digests(folder: Path, checkpoint: str = f"update-{UPDATES:08d}") -> dict[str, str]:
    """Checksums of the files of one checkpoint."""
    files = (folder / "checkpoints" / checkpoint).iterdir()
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def metrics(folder: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv without the column of time."""
    with (folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        del row["elapsed_seconds"]
    return rows


def status(folder: Path) -> tuple[str, str]:
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    return record["status"], record["reason"]


def launch(*words: object, processes: int = 1, **options: Any) -> subprocess.Popen[str]:
    """Start this file as a program of its own."""
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), **options.pop("env", {})}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(
        [*start, __file__, *map(str, words)], env=environment, **{**pipes, **options}
    )


def strike(fault: str, loss: Any) -> Any:
    """Return a loss that is not one, fail, or send this process a signal."""
    if fault == "nan":
        return loss * float("nan")
    if fault == "crash":
        raise RuntimeError("sample 17 is bad")
    os.kill(os.getpid(), getattr(signal, f"SIG{fault.upper()}"))
    return loss


def main(words: list[str]) -> int:
    """One training: `FOLDER [resume=auto|named] [FAULT=UPDATE] [slow=S] [workers=N] [a__b=value]`.

    FAULT is one of kill, term, int, usr1, nan, crash. `HARM_RANK` picks the process that is hit.
    Or `collect FILE N…`: write the outputs for sets of N images into FILE-RANK.json.
    Several such groups of words, with `--` between them, run one after another in the same
    processes.
    """
    if words[0] == "collect":
        found = [collect(int(samples)) for samples in words[2:]]
        rank = os.environ.get("RANK", "0")
        Path(f"{words[1]}-{rank}.json").write_text(json.dumps(found), encoding="utf-8")
        return 0
    folder, given = Path(words[0]), dict(word.split("=") for word in words[1:])
    resume, slow = given.pop("resume", ""), float(given.pop("slow", 0))
    workers = given.pop("workers", None)
    kinds = ("kill", "term", "int", "usr1", "nan", "crash")
    faults = {name: int(given.pop(name)) for name in kinds if name in given}
    options = settings(**given)

    def harm(step: Any, loss: Any) -> Any:
        time.sleep(slow)
        # In two processes only one is told: all must stop at the same update.
        if os.environ.get("RANK", "0") == os.environ.get("HARM_RANK", "0"):
            for name, update in faults.items():
                if update == step.index:
                    loss = strike(name, loss)
        return loss

    from moectl.engine import console
    from moectl.engine.errors import Interrupted, RunFailed, UserError

    console.setup()
    try:
        with open_run(folder, options, resume=resume) as run:
            train(run, harm, data=source(workers=int(workers)) if workers else None)
    except Interrupted:
        return 75
    except KeyboardInterrupt:
        return 130
    except RunFailed as error:
        console.error(str(error))
        return 1
    except UserError as error:
        console.error(error.message, error.hint)
        return 2
    return 0


def groups(words: list[str]) -> list[list[str]]:
    text = "\n".join(words)
    return [part.split("\n") for part in text.split("\n--\n")]


if __name__ == "__main__":
    codes = [main(group) for group in groups(sys.argv[1:])]
    if len(codes) > 1:
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(codes))  # noqa: T201
        leave()
    leave(codes[0])
