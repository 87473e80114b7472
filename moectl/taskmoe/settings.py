"""Every knob of taskmoe: specialist classifiers merged into one gated mixture."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator
from pydantic_settings import SettingsConfigDict

from moectl.engine.sections import OptimSection, ScheduleSection, TrainSection
from moectl.engine.settings import Flag, Free, Section, Settings


class DataSection(Section):
    """The classes of the specialists and their images."""

    task: Annotated[str, Flag("--task")] = "A"
    """`A`, `B`, `digits`, `digits_overlap`, or the manifest.toml of another task."""
    root: Annotated[Path, Flag("--data-dir", "--root"), Free()] = Path("data")
    """Folder with TaskA and TaskB; `taskmoe data build` writes them."""
    label_map: Annotated[Literal["global", "offset"], Flag("--label-map")] = "global"
    """Classes in the order of their original ids, or specialist after specialist."""
    dedup: Annotated[Literal["owner", "content", "none"], Flag("--dedup")] = "owner"
    """Shared classes: from their first owner's files only, without equal images, or as they are."""
    augment: Annotated[Literal["none", "flip", "crop_flip"], Flag("--augment")] = "none"
    """Random transforms of the training images."""
    val_fraction: Annotated[float, Flag("--val-fraction"), Field(gt=0, lt=1)] = 0.1
    """Share of every class of the training images that selects the best epoch."""
    split_seed: Annotated[int, Flag("--split-seed"), Field(ge=0)] = 100
    """Seed of the choice of these images; the same for specialists, merge and training."""
    allow_pickle: Annotated[bool, Flag("--allow-pickle", "--trust-pickle")] = False
    """Read data files that hold more than tensors and plain types; they may run code."""

    @field_validator("task")
    @classmethod
    def _one_name_for_a_manifest(cls, task: str) -> str:
        return str(Path(task).resolve()) if task.endswith(".toml") else task


class ModelSection(Section):
    """The merged network."""

    num_experts: Annotated[int, Flag("--num-experts"), Field(ge=1, le=64)] = 3
    """Number of specialists, each of which becomes an expert."""
    width: Annotated[int, Flag("--width"), Field(ge=2)] = 64
    """Channels of the first layer; the others are 2, 4 and 8 times as wide."""
    combine: Annotated[Literal["features", "logits"], Flag("--combine")] = "features"
    """What the gates mix: the experts' features before one classifier, or their logits."""
    gating_feature_dim: Annotated[int, Field(ge=0)] = 256
    """Features of the gate that the classifier sees beside the experts'; 0 for none."""
    gating_feature_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the images for which the classifier does not see them, in training."""
    dropout_expert: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Dropout in the experts and the specialists."""
    dropout_gate: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Dropout in the gating network."""
    gate_noise_std: Annotated[float, Field(ge=0)] = 0.1
    """Noise on the gate logits in training, after the temperature."""
    top_k: Annotated[int, Flag("--top-k"), Field(ge=0)] = 0
    """Experts that act on an image; 0 for all."""
    shared_until: Annotated[
        Literal["conv1", "residual1", "residual2", "conv2"], Flag("--shared-until")
    ] = "conv2"
    """Last layer that the experts share."""


class MergeSection(Section):
    """How specialists become the start of the mixture."""

    method: Annotated[Literal["average", "align", "first", "none"], Flag("--method")] = "average"
    """Shared layers: averaged, averaged with channels matched, the first's, or random."""
    bn: Annotated[Literal["recalibrate", "average", "pooled", "reset"], Flag("--bn")] = (
        "recalibrate"
    )
    """Batch-norm statistics of the shared layers: measured anew, averaged, pooled, or 0 and 1."""
    classifier_init: Annotated[Literal["assembled", "random"], Flag("--classifier-init")] = (
        "assembled"
    )
    """Rows of the classifier: the specialists', or random."""
    gate_init: Annotated[Literal["prototype", "uniform"], Flag("--gate-init")] = "uniform"
    """Last layer of the gate: from the mean inputs of each specialist's classes, or near zero."""


class GateSection(Section):
    """The temperature of the gates over the epochs."""

    initial_temperature: Annotated[float, Flag("--initial-temperature"), Field(gt=0)] = 2.0
    """Temperature of the first epoch; usual are 1.5 to 4."""
    final_temperature: Annotated[float, Flag("--final-temperature"), Field(gt=0)] = 0.5
    """Temperature that the schedule ends at; usual are 0.3 to 1."""
    schedule: Annotated[Literal["cosine", "linear", "constant"], Flag("--temperature-schedule")] = (
        "cosine"
    )
    """Way from the one to the other."""
    anneal_epochs: Annotated[int, Flag("--anneal-epochs"), Field(ge=0)] = 0
    """Epochs that it takes; 0 takes train.epochs."""


class LossSection(Section):
    """The terms of the loss."""

    diversity_weight: Annotated[float, Flag("--diversity-weight"), Field(ge=0)] = 0.1
    """Weight of the sharpness penalty: more makes gates more one-hot; usual are 0.05 to 0.2."""
    balance_weight: Annotated[float, Flag("--balance-weight"), Field(ge=0)] = 0.5
    """Weight of equal use of the experts over a batch; usual are 0.3 to 1."""
    diversity: Literal["gini", "entropy"] = "gini"
    """Form of the sharpness penalty."""
    balance: Annotated[Literal["l2", "kl", "switch", "importance"], Flag("--balance")] = "l2"
    """Form of the balance term."""
    reduction: Literal["mean", "sum"] = "mean"
    """Of the task and sharpness terms over a batch; sum favours the collapse onto one expert."""
    gate_supervision_weight: Annotated[float, Flag("--gate-supervision-weight"), Field(ge=0)] = 0.0
    """Weight of the likelihood of the owners of an image's class; 0 leaves the gates free."""
    z_loss_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the squared log-sum-exp of the gate logits; 0 turns it off."""
    distill_weight: Annotated[float, Flag("--distill-weight"), Field(ge=0)] = 0.0
    """Weight of the divergence from the owners' soft targets; 0 turns it off."""
    distill_temperature: Annotated[float, Field(gt=0)] = 4.0
    """Temperature of the soft targets."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the target that is spread over all classes."""


class TaskmoeOptim(OptimSection):
    """The optimiser."""

    name: Annotated[Literal["sgd", "adam", "adamw"], Flag("--optimizer")] = "adam"
    """Optimiser."""
    lr: Annotated[float, Flag("--lr"), Field(gt=0)] = 1e-3
    """Learning rate before the schedule."""
    weight_decay: Annotated[float, Flag("--weight-decay", "--wd"), Field(ge=0)] = 1e-4
    """Weight decay on all parameters; 0 turns it off."""


class TaskmoeTrain(TrainSection):
    """How the training runs."""

    epochs: Annotated[int, Flag("--num-epochs", "--epochs"), Field(ge=1)] = 100
    """Passes over the training data."""
    batch_size: Annotated[int, Flag("--batch-size", "--bs"), Field(ge=2)] = 32
    """Samples per optimiser update, over all processes and micro-batches."""
    seed: Annotated[int, Flag("--seed", "-s"), Field(ge=0)] = 100
    """Seed of the initial weights, the order of the samples and every random choice."""
    patience: Annotated[int, Flag("--patience"), Field(ge=0)] = 20
    """Epochs without a better validation score before stopping early; 0 never stops early."""
    expert_analysis_interval: Annotated[
        int, Flag("--expert-analysis-interval"), Free(), Field(ge=0)
    ] = 10
    """Epochs between analyses of the experts; 0 for none."""
    freeze_extractor_epochs: Annotated[int, Flag("--freeze-extractor-epochs"), Field(ge=0)] = 0
    """Epochs at the start in which the shared layers stay as merged."""
    select_on: Annotated[Literal["val", "test"], Flag("--select-on")] = "val"
    """Images that choose the best epoch; test only to mimic the original, and is labelled so."""


class SpecialistSection(Section):
    """Which of the specialists is trained."""

    number: Annotated[int, Flag("--specialist"), Field(ge=0)] = 1
    """Its place in the manifest, from 1 on; 0 is one dense network of the mixture's size."""


class EvalSection(Section):
    """What is measured after training."""

    batch_size: Annotated[int, Flag("--batch-size"), Field(ge=1)] = 256
    """Images per forward pass."""
    num_samples: Annotated[int, Flag("--num-samples"), Free(), Field(ge=0)] = 10
    """Classes with an image in the picture of sample predictions."""
    seed: Annotated[int, Flag("--seed"), Free(), Field(ge=0)] = 100
    """Seed of the choice of these images, and of resampling."""
    bootstrap: Annotated[int, Free(), Field(ge=0)] = 1000
    """Resamples behind intervals; 0 gives none."""


class TaskmoeSettings(Settings):
    """All tables of taskmoe."""

    model_config = SettingsConfigDict(env_prefix="MOECTL_TASKMOE__")

    data: DataSection = DataSection()
    model: ModelSection = ModelSection()
    merge: MergeSection = MergeSection()
    gate: GateSection = GateSection()
    loss: LossSection = LossSection()
    optim: TaskmoeOptim = TaskmoeOptim()
    schedule: ScheduleSection = ScheduleSection()
    train: TaskmoeTrain = TaskmoeTrain()
    specialist: SpecialistSection = SpecialistSection()
    eval: EvalSection = EvalSection()

    def ties_epochs(self, command: str) -> bool:
        """Whether the number of epochs shapes what is done before the last of them."""
        return (
            command == "train"
            and self.gate.schedule != "constant"
            and not (self.gate.anneal_epochs)
        )

    @model_validator(mode="after")
    def _whole_batches(self) -> "TaskmoeSettings":
        whole = self.loss.balance_weight or self.loss.reduction == "sum"
        if self.train.accumulate > 1 and whole:
            raise ValueError(
                f"train.accumulate = {self.train.accumulate}: the experts are balanced over whole"
                " batches; use more processes, or loss.balance_weight = 0 and loss.reduction = mean"
            )
        return self

    @model_validator(mode="after")
    def _as_many_kept_as_there_are(self) -> "TaskmoeSettings":
        if self.model.top_k > self.model.num_experts:
            raise ValueError(
                f"model.top_k is {self.model.top_k}, but model.num_experts is"
                f" {self.model.num_experts}"
            )
        return self
