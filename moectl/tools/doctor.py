"""`moectl doctor`: whether this machine and this installation can do the work."""

import importlib
import importlib.util
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from moectl import __version__
from moectl.engine import console
from moectl.engine.errors import RunFailed, UserError
from moectl.engine.launch import choose_threads, cores, offline
from moectl.engine.options import Json
from moectl.engine.run import runs_root
from moectl.engine.sections import OptimSection, ScheduleSection, TrainSection
from moectl.engine.settings import ENVIRONMENT, Settings, resolve, unknown_variables
from moectl.tools.rooms import rooms, settings_class

if TYPE_CHECKING:
    from moectl.engine.run import Run

EXTRAS = {"wandb": "wandb", "medical": "pydicom", "fid": "torch_fidelity"}
_ROOM_FOR_A_RUN = 2**30
_PAIR = "pip install --upgrade torch torchvision, both from the same index"


class Finding(NamedTuple):
    """One line of the examination."""

    verdict: Literal["ok", "warn", "fail"]
    what: str
    found: str
    remedy: str = ""


def doctor(
    as_json: Json = False,
) -> None:
    """Check this machine and this installation."""
    console.setup(quiet=True, as_json=as_json)
    findings = [finding for check in CHECKS for finding in examine(check)]
    rows = [tuple(finding) for finding in findings]
    document = [finding._asdict() for finding in findings]
    console.result(document, console.table(("", "what", "found", "what to do"), rows))
    failed = [finding.what for finding in findings if finding.verdict == "fail"]
    if failed:
        raise RunFailed(f"not fit for work: {', '.join(failed)}")


def examine(check: Callable[[], Iterator[Finding]]) -> list[Finding]:
    """Return what a check finds; an error inside it is a finding too."""
    findings = []
    try:
        for finding in check():
            findings.append(finding)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        findings.append(Finding("fail", check.__name__.replace("_", " "), reason))
    return findings


def interpreter() -> Iterator[Finding]:
    """Python and moectl itself."""
    yield Finding("ok", "Python", f"{platform.python_version()}, moectl {__version__}")


def threads() -> Iterator[Finding]:
    """CPU threads, chosen before torch is imported, which reads them once."""
    wanted, available = os.environ.get("OMP_NUM_THREADS"), cores()
    chosen = choose_threads(0)
    found = f"{chosen} of {available} cores"
    found += f", as OMP_NUM_THREADS={wanted} says" if wanted else ""
    if chosen > available:
        yield Finding("warn", "CPU threads", found, "more threads than cores wait for each other")
    else:
        yield Finding("ok", "CPU threads", found)


def libraries() -> Iterator[Finding]:
    """The libraries that all systems need."""
    for name in ("torch", "torchvision", "accelerate"):
        remedy = _PAIR if name.startswith("torch") else f"pip install --upgrade {name}"
        try:
            importlib.import_module(name)
        except (ImportError, OSError, RuntimeError) as error:
            reason = f"cannot be imported: {str(error).splitlines()[0]}"
            yield Finding("fail", name, reason, remedy)
        else:
            yield Finding("ok", name, version(name))


def devices() -> Iterator[Finding]:
    """What computes, and in which precision."""
    import torch

    from moectl.engine.launch import choose_precision

    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(number)
            found = f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB"
            yield Finding("ok", f"GPU {number}", found)
    elif shutil.which("nvidia-smi"):
        remedy = f"this torch has no CUDA, or the driver is too old; {_PAIR}"
        yield Finding("warn", "GPU", "there is a driver, but torch sees no device", remedy)
    else:
        yield Finding("ok", "GPU", "none: everything runs on the CPU")
    native = choose_precision("auto", cpu=False) == "bf16"
    found = "native; precision auto takes it" if native else "not native; precision auto takes fp32"
    yield Finding("ok", "bf16", found)


def runs_folder() -> Iterator[Finding]:
    """Where runs are written."""
    root = runs_root().absolute()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root) as file:
            file.write(b"x")
    except OSError as error:
        remedy = "make it writable, or point MOECTL_RUNS elsewhere"
        yield Finding("fail", "runs folder", f"{root}: {error.strerror}", remedy)
        return
    yield Finding("ok", "runs folder", str(root))
    free = shutil.disk_usage(root).free
    verdict: Literal["ok", "warn"] = "ok" if free >= _ROOM_FOR_A_RUN else "warn"
    remedy = "" if verdict == "ok" else "free some, or point MOECTL_RUNS to another disk"
    yield Finding(verdict, "free disk", f"{free / 2**30:.1f} GiB", remedy)


def variables() -> Iterator[Finding]:
    """The environment variables that set something, and those that only seem to."""
    classes = {room: settings_class(room) for room in rooms()}
    unknown = unknown_variables(list(classes.values()))
    active = [name for name in sorted(os.environ) if name.upper().startswith("MOECTL_")]
    known = [f"{name}={os.environ[name]}" for name in active if name.upper() not in unknown]
    yield Finding("ok", "variables", ", ".join(known) or "no MOECTL_… set")
    for name in unknown:
        room = name.upper().removeprefix(ENVIRONMENT).partition("__")[0].lower()
        room = room if room in classes else "ROOM"
        remedy = (
            f"moectl presets show {room} lists the settings: MOECTL_{room.upper()}__TABLE__NAME"
        )
        yield Finding("warn", "variables", f"{name} sets nothing", remedy)


def data() -> Iterator[Finding]:
    """The data folder of every system, as its settings and the environment give it."""
    for room in rooms():
        try:
            settings, _ = resolve(settings_class(room), {}, [], [])
        except UserError as error:
            yield Finding("fail", f"{room} settings", error.message)
            continue
        root: Path | None = getattr(getattr(settings, "data", None), "root", None)
        if root is None:
            continue
        if not root.is_dir():
            found = f"{root.absolute()}: not there"
            remedy = "set data.root to your data; public sets are downloaded into it on first use"
            yield Finding("warn", f"{room} data", found, remedy)
            continue
        inside = sorted(path.name for path in root.iterdir() if path.is_dir())
        yield Finding("ok", f"{room} data", f"{root.absolute()}: {', '.join(inside) or 'empty'}")


def surroundings() -> Iterator[Finding]:
    """Network, version control, extras and launcher."""
    yield Finding("ok", "network", "not used (MOECTL_OFFLINE)" if offline() else "may be used")
    yield _git()
    for extra, module in EXTRAS.items():
        if importlib.util.find_spec(module):
            yield Finding("ok", f"extra {extra}", "installed")
        else:
            yield Finding("ok", f"extra {extra}", "not there", f"pip install 'moectl[{extra}]'")
    from accelerate.commands.config import config_args

    path = Path(config_args.default_config_file)
    found = f"configured by {path}" if path.exists() else "no configuration file"
    yield Finding("ok", "accelerate launch", found)


def _git() -> Finding:
    words = ["git", "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        remedy = "runs started inside a git repository record its commit"
        return Finding("ok", "git", "no commit here", remedy)
    return Finding("ok", "git", f"commit {done.stdout.strip()}")


class Rehearsal(Settings):
    """Settings of the tiny training."""

    optim: OptimSection = OptimSection()
    schedule: ScheduleSection = ScheduleSection()
    train: TrainSection = TrainSection(epochs=2, batch_size=16, log_every=0, tensorboard=False)


def training() -> Iterator[Finding]:
    """Train something tiny on this machine's device, save it, and go on from what was saved."""
    with tempfile.TemporaryDirectory() as folder:
        before, after = rehearse(Path(folder) / "run")
    found = f"loss {before:.3f} to {after:.3f}, saved and resumed"
    if after < before:
        yield Finding("ok", "training", found)
    else:
        yield Finding("fail", "training", found, "the device computes wrongly; --cpu avoids it")


def rehearse(folder: Path) -> tuple[float, float]:
    """Train two epochs into a run folder, resume for two more, return the first and last loss."""
    from moectl.engine import run as runs
    from moectl.engine.launch import build_accelerator

    settings = Rehearsal()
    longer = Rehearsal(train=settings.train.model_copy(update={"epochs": 4}))
    accelerator = build_accelerator(settings.train, cpu=False)
    words = {"room": "doctor", "command": "doctor", "name": "check"}
    with runs.create(settings, accelerator, out=folder, origin={}, **words) as run:
        first = _train(run)
    with runs.reopen(folder, longer, accelerator, auto=False) as run:
        second = _train(run)
    if len(second) != len(first):
        raise RunFailed(f"{len(second)} updates after the resume instead of {len(first)}")
    return first[0], second[-1]


def _train(run: "Run[Rehearsal]") -> list[float]:
    """Tell bright images from dark ones, and return the loss of every update."""
    import torch
    from torch import nn

    from moectl.engine.optim import build_optimizer, build_schedule
    from moectl.engine.seeding import seed_all
    from moectl.engine.sources import TensorSource

    seed_all(run.settings.train.seed, "init")
    labels = torch.arange(64) % 2
    images = torch.randint(0, 128, (64, 1, 4, 4)) + 127 * labels.view(-1, 1, 1, 1)
    source = TensorSource(images.to(torch.uint8), labels, None, lambda pixels: pixels / 255 - 0.5)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).to(run.device)
    optimizer = build_optimizer(run.settings.optim, model.parameters())
    schedule = build_schedule(run.settings.schedule, run.settings.optim.lr, 1)
    loop = run.loop(model, source, optimizer, schedule)
    losses = []
    for step in loop:
        pixels, truth = step.batch
        loss = nn.functional.cross_entropy(loop.model(pixels), truth)
        step.update(loss)
        losses.append(float(loss.detach()))
    return losses


CHECKS = (
    interpreter,
    threads,
    libraries,
    devices,
    runs_folder,
    variables,
    data,
    surroundings,
    training,
)
