"""The tables of settings that every trained system has."""

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from moectl.engine.settings import Flag, Free, Section


class OptimSection(Section):
    """The optimiser."""

    name: Annotated[Literal["sgd", "adam", "adamw"], Flag("--optimizer")] = "sgd"
    """Optimiser."""
    lr: Annotated[float, Flag("--lr"), Field(gt=0)] = 0.1
    """Learning rate before the schedule."""
    weight_decay: Annotated[float, Flag("--weight-decay", "--wd"), Field(ge=0)] = 0.0
    """Weight decay on all parameters; 0 turns it off."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Momentum of sgd, ignored by the others; 0 turns it off."""
    nesterov: bool = False
    """Nesterov's form of the momentum of sgd."""
    clip_norm: Annotated[float, Field(ge=0)] = 0.0
    """Largest norm of the gradient; 0 turns clipping off."""

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> "OptimSection":
        if self.name == "sgd" and self.nesterov and not self.momentum:
            raise ValueError("optim.nesterov needs optim.momentum above 0")
        return self


class ScheduleSection(Section):
    """The learning rate over the epochs."""

    name: Annotated[Literal["constant", "multistep", "cosine"], Flag("--schedule")] = "constant"
    """Shape of the learning rate."""
    warmup: Annotated[int, Flag("--warmup"), Field(ge=0)] = 0
    """Epochs of linear warm-up; 0 turns it off."""
    step1: Annotated[int, Flag("--step1"), Field(ge=0)] = 0
    """Epoch of the first drop of multistep."""
    step2: Annotated[int, Flag("--step2"), Field(ge=0)] = 0
    """Epoch of the second drop of multistep."""
    gamma: Annotated[float, Flag("--gamma"), Field(gt=0, le=1)] = 0.1
    """Factor of each drop of multistep."""
    t_max: Annotated[int, Flag("--t-max"), Field(ge=0)] = 0
    """Epochs of the cosine's half period; 0 takes train.epochs."""
    eta_min: Annotated[float, Flag("--eta-min"), Field(ge=0)] = 0.0
    """Learning rate at the end of the cosine."""

    @model_validator(mode="after")
    def _steps_in_order(self) -> "ScheduleSection":
        if self.name == "multistep" and self.step1 > self.step2:
            raise ValueError(
                f"schedule.step1 = {self.step1} must not be after schedule.step2 = {self.step2}"
            )
        return self


class TrainSection(Section):
    """How the training runs."""

    epochs: Annotated[int, Flag("--epochs"), Free(grows=True), Field(ge=1)] = 1
    """Passes over the training data."""
    batch_size: Annotated[int, Flag("--batch-size", "--bs"), Field(ge=1)] = 128
    """Samples per optimiser update, over all processes and micro-batches."""
    accumulate: Annotated[int, Field(ge=1)] = 1
    """Micro-batches that each batch is cut into, to save memory."""
    seed: Annotated[int, Flag("--seed", "-s"), Field(ge=0)] = 1
    """Seed of the initial weights, the order of the samples and every random choice."""
    precision: Annotated[Literal["auto", "no", "bf16", "fp16"], Flag("--precision")] = "auto"
    """Mixed precision; auto takes bf16 where the processor computes it natively, else none."""
    threads: Annotated[int, Flag("--threads"), Free(), Field(ge=0)] = 0
    """CPU threads per process; 0 leaves a core free and divides the rest by the processes."""
    compile: Annotated[bool, Flag("--compile")] = False
    """Compile the model with torch.compile."""
    deterministic: Annotated[bool, Flag("--deterministic")] = False
    """Ask torch for deterministic kernels, so that resume is bit-exact on a GPU too."""
    patience: Annotated[int, Flag("--patience"), Field(ge=0)] = 0
    """Epochs without a better validation score before stopping early; 0 never stops early."""
    max_time: Annotated[str, Flag("--max-time"), Free()] = ""
    """Save and stop, resumable, after this long, for instance 3h50m; empty for no limit."""
    log_every: Annotated[int, Free(), Field(ge=0)] = 50
    """Updates between rows of running means in metrics.csv; 0 writes rows at epoch ends only."""
    save_minutes: Annotated[float, Free(), Field(ge=0)] = 5.0
    """Minutes between checkpoints of the training state; 0 saves after every update."""
    keep: Annotated[int, Free(), Field(ge=2)] = 2
    """Newest checkpoints of the training state to keep, beside the best."""
    tensorboard: Annotated[bool, Free()] = True
    """Write TensorBoard event files into the run folder."""
    wandb: Annotated[bool, Flag("--use-wandb"), Free()] = False
    """Log to Weights & Biases as well (extra `wandb`; WANDB_MODE=offline is honoured)."""
    wandb_project: Annotated[str, Flag("--wandb-project"), Free()] = ""
    """Project there; empty for moectl and the name of the system."""
    wandb_entity: Annotated[str, Flag("--wandb-entity"), Free()] = ""
    """User or team there; empty for your own."""
    wandb_name: Annotated[str, Flag("--wandb-name"), Free()] = ""
    """Name of the run there; empty for that of the run folder."""

    @field_validator("max_time")
    @classmethod
    def _duration(cls, text: str) -> str:
        seconds_of(text)
        return text

    @property
    def max_seconds(self) -> float:
        """The time limit in seconds; infinite without one."""
        return seconds_of(self.max_time) if self.max_time else float("inf")


def seconds_of(duration: str) -> float:
    """Read a duration such as 3h50m, 45m or 90s.

    Raises:
        ValueError: if it is written otherwise.
    """
    match = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s)?", duration)
    if match is None:
        raise ValueError(f"{duration!r} is not a duration such as 3h50m, 45m or 90s")
    hours, minutes, seconds = (float(part or 0) for part in match.groups())
    return hours * 3600 + minutes * 60 + seconds
