"""Every knob of csr: concepts, prototypes of each, and a verdict that adds up."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from pydantic_settings import SettingsConfigDict

from moectl.engine.sections import OptimSection, ScheduleSection, TrainSection
from moectl.engine.settings import Flag, Free, Section, Settings

_Table = Path | None


class DataSection(Section):
    """Label tables, images and boxes."""

    dataset: Annotated[Literal["csv", "isic", "synthetic"], Flag("--dataset")] = "csv"
    """Tables of your own (VinDr-CXR's and others), tables with the columns of ISIC 2017, or glyphs
    that are drawn."""
    train_csv: Annotated[Path, Flag("--train-csv")] = Path("labels_train.csv")
    """Label table of the training images."""
    test_csv: Annotated[Path, Flag("--test-csv")] = Path("labels_test.csv")
    """Label table of the test images."""
    train_dir: Annotated[Path, Flag("--train-dir")] = Path("train")
    """Folder of the training images."""
    test_dir: Annotated[Path, Flag("--test-dir")] = Path("test")
    """Folder of the test images."""
    train_bbox_csv: Annotated[_Table, Flag("--train-bbox-csv")] = None
    """Boxes of concepts in the training images; with those of the test images."""
    test_bbox_csv: Annotated[_Table, Flag("--test-bbox-csv")] = None
    """Boxes of concepts in the test images."""
    train_resize_factor_csv: Annotated[_Table, Flag("--train-resize-factor-csv")] = None
    """Sizes before and after resizing, for boxes in pixels of the original images."""
    test_resize_factor_csv: Annotated[_Table, Flag("--test-resize-factor-csv")] = None
    """The same of the test images."""
    box_units: Annotated[Literal["original", "resized", "normalized"], Flag("--box-units")] = (
        "original"
    )
    """Pixels of the original or of the stored images, or shares of them."""
    aggregate: Annotated[str, Flag("--aggregate")] = "any"
    """What several readers make of an image: any, majority, mean, or reader:ID."""
    concept_set: Annotated[Literal["auto", "vinbigdata14"], Flag("--concept-set")] = "auto"
    """Which columns are concepts: by their names, or the 14 findings of VinBigData."""
    image_column: Annotated[str, Flag("--image-column")] = ""
    """Column with the ids of the images; empty for image_id, or what the dataset calls it."""
    concept_columns: Annotated[str, Flag("--concept-columns")] = ""
    """Concepts by name, with commas; overrules the set."""
    target_columns: Annotated[str, Flag("--target-columns")] = ""
    """Targets by name, with commas; overrules the set. With one class per image this may be the one
    column that holds its name."""
    task_mode: Annotated[Literal["multilabel", "multiclass"], Flag("--task-mode")] = "multilabel"
    """Whether an image may have several targets, or exactly one."""
    patient_pattern: str = ""
    """Regular expression that finds the patient in an image's id; empty for each its own."""
    channels: Annotated[Literal["grey", "rgb"], Flag("--channels")] = "grey"
    """How images are read."""
    image_size: Annotated[int, Flag("--image-size"), Field(ge=16)] = 224
    """Side of the square that the network sees, in pixels."""
    normalize: Annotated[Literal["imagenet", "medmae", "dataset"], Flag("--normalize")] = "imagenet"
    """Statistics that images are normalised with."""
    hflip: Annotated[float, Flag("--hflip"), Field(ge=0, le=1)] = 0.5
    """Probability of mirroring a training image; it also mirrors the heart."""
    degrees: Annotated[float, Field(ge=0, le=180)] = 10.0
    """Largest turn of a training image."""
    jitter: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Largest relative change of its brightness and contrast."""
    augment_heads: Annotated[bool, Flag("--augment-heads")] = True
    """Also while prototypes and verdict are trained; without, features are computed once."""
    val_fraction: Annotated[float, Flag("--val-fraction"), Field(gt=0, lt=1)] = 0.1
    """Share of the training images that choose the best epochs."""
    stratify: bool = False
    """Spread the targets evenly over training and validation images."""
    min_positives: Annotated[int, Flag("--min-positives"), Field(ge=0)] = 0
    """Columns with fewer positive training images are left out; 0 keeps all."""
    balance_no_finding: Annotated[float, Flag("--balance-no-finding"), Field(ge=0, lt=1)] = 0.0
    """Share of the training images that may be without any finding; 0 keeps all."""
    synthetic_images: Annotated[int, Field(ge=10)] = 1200
    """Training images of the glyphs; a third as many test."""
    shortcut: str = ""
    """A glyph whose images have a mark in a corner; empty for none."""
    workers: Annotated[int, Flag("--workers"), Free(), Field(ge=0)] = 4
    """Loader processes; 0 reads in the main process."""


class ModelSection(Section):
    """The network."""

    backbone_type: Annotated[
        Literal[
            "medmae", "vit", "resnet18", "resnet34", "resnet50", "densenet121", "convnext_tiny",
            "tiny",
        ],
        Flag("--backbone-type"),
    ] = "medmae"  # fmt: skip
    """What gives the features."""
    model_name: Annotated[str, Flag("--model-name")] = ""
    """Hub model or weights file of the backbone; empty takes the usual one of its type."""
    pretrained: Annotated[bool, Flag("--pretrained")] = True
    """Start the backbone from public weights."""
    allow_pickle: Annotated[bool, Flag("--allow-pickle", "--trust-pickle")] = False
    """Read a weights file that holds more than tensors; it may run code."""
    num_prototypes: Annotated[int, Flag("--num-prototypes"), Field(ge=1)] = 5
    """Prototypes of each concept."""
    projection: Annotated[int, Field(ge=2)] = 128
    """Width of the space in which they are compared."""
    concept_pool: Annotated[Literal["max", "avg", "lse"], Flag("--concept-pool")] = "max"
    """What makes an image's concept logit of a map."""
    projector: Annotated[Literal["mlp", "ibn"], Flag("--projector")] = "mlp"
    """Two convolutions, or the paper's three residual blocks."""
    local_order: Annotated[Literal["pool_first", "project_first"], Flag("--local-order")] = (
        "pool_first"
    )
    """Whether features are averaged over a concept's map before they are projected."""
    task_input: Annotated[Literal["all", "max"], Flag("--task-input")] = "all"
    """Similarities to all prototypes, or the largest of each concept."""
    task_norm: Annotated[Literal["standardize", "none"], Flag("--task-norm")] = "standardize"
    """Whether similarities are standardised by the training images before the task head."""


class ConceptSection(Section):
    """Stage 1: the backbone and the concept maps."""

    loss: Annotated[Literal["bce", "focal", "asymmetric"], Flag("--concept-loss")] = "bce"
    """Loss of the concept logits."""
    pos_weight_cap: Annotated[float, Flag("--pos-weight-cap"), Field(ge=0)] = 20.0
    """Largest weight of a rare concept's positives; 0 for no limit."""
    alpha: Annotated[float, Flag("--alpha"), Field(ge=0)] = 1.0
    """Weight of that loss beside the boxes."""
    beta: Annotated[float, Flag("--beta"), Field(ge=0)] = 0.5
    """Weight of the boxes, where there are any."""
    loc_loss: Annotated[Literal["mse", "hinge"], Flag("--loc-loss")] = "mse"
    """Loss of a map inside and outside of its boxes."""
    backbone_lr: Annotated[float, Flag("--lr-mult-stage1"), Field(gt=0)] = 0.1
    """Factor on the learning rate of the backbone."""


class PrototypeSection(Section):
    """Stage 2: the projector and the prototypes."""

    loss: Annotated[Literal["softtriple", "infonce"], Flag("--proto-loss")] = "softtriple"
    """Loss; infonce, the original's, lets the prototypes of a concept become one."""
    scale: Annotated[float, Field(gt=0)] = 20.0
    """Lambda of the first."""
    gamma: Annotated[float, Field(gt=0)] = 1000.0
    """How sharply it chooses among the prototypes of a concept."""
    margin: Annotated[float, Field(ge=0)] = 0.1
    """Margin of the true concept."""
    margin_mode: Annotated[
        Literal["subtract", "add", "numerator", "none"], Flag("--margin-mode")
    ] = "subtract"
    """Where the margin stands; only the first enforces one."""
    temperature: Annotated[float, Field(gt=0)] = 0.3
    """Temperature of infonce."""
    init: Annotated[Literal["random", "sample", "kmeans"], Flag("--proto-init")] = "random"
    """Where prototypes begin."""
    revive_every: Annotated[int, Flag("--revive-every"), Field(ge=0)] = 0
    """Epochs between new places for prototypes that nothing is nearest to; 0 for never."""
    diversity_weight: Annotated[float, Flag("--proto-diversity-weight"), Field(ge=0)] = 0.0
    """Weight of keeping the prototypes of a concept apart."""
    lr_factor: Annotated[float, Flag("--lr-mult-stage2"), Field(gt=0)] = 10.0
    """Factor on the learning rate."""


class TaskSection(Section):
    """Stage 3: the task head."""

    loss: Annotated[
        Literal["bce", "bce_pos_weight", "focal", "asymmetric", "class_balanced", "ce"],
        Flag("--task-loss"),
    ] = "bce"
    """Loss; a task of one class per image takes ce."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the target of ce that is spread over all classes."""
    start: Annotated[Literal["last", "best"], Flag("--stage2-pick")] = "last"
    """Prototypes of the last epoch, or of the one with the highest assignment accuracy."""
    curation: Annotated[_Table, Flag("--curation")] = None
    """File that says which prototypes have a say, as `csr atlas` writes it."""
    lr_factor: Annotated[float, Flag("--lr-mult-stage3"), Field(gt=0)] = 1.0
    """Factor on the learning rate; 10 suits standardised similarities."""


class CsrOptim(OptimSection):
    """The optimiser."""

    name: Annotated[Literal["sgd", "adam", "adamw"], Flag("--optimizer")] = "adamw"
    """Optimiser."""
    lr: Annotated[float, Flag("--lr"), Field(gt=0)] = 1e-4
    """Learning rate before the factors of the stages."""
    weight_decay: Annotated[float, Flag("--weight-decay", "--wd"), Field(ge=0)] = 0.01
    """Weight decay of kernels and matrices; prototypes, norms and biases have none."""
    clip_norm: Annotated[float, Field(ge=0)] = 1.0
    """Largest norm of the gradient; 0 turns clipping off."""


class CsrTrain(TrainSection):
    """How the training runs."""

    epochs_stage1: Annotated[int, Flag("--epochs-stage1"), Field(ge=0)] = 10
    """Passes over the training images for the concepts."""
    epochs_stage2: Annotated[int, Flag("--epochs-stage2"), Field(ge=0)] = 10
    """Passes for the prototypes."""
    epochs_stage3: Annotated[int, Flag("--epochs-stage3"), Free(grows=True), Field(ge=0)] = 10
    """Passes for the task head."""
    feature_cache: Annotated[str, Flag("--feature-cache")] = "auto"
    """Where features of images that do not move are kept: auto (in the run, while it needs them),
    off (computed in every epoch), or a folder that runs share."""
    epochs: int = 1
    """Not used: every stage has its own."""
    batch_size: Annotated[int, Flag("--batch-size", "--bs"), Field(ge=2)] = 16
    """Images per optimiser update and process."""
    seed: Annotated[int, Flag("--seed", "-s"), Field(ge=0)] = 42
    """Seed of the initial weights, the order of the samples and every random choice."""


class EvalSection(Section):
    """What is measured after training."""

    batch_size: Annotated[int, Field(ge=1)] = 64
    """Images per forward pass."""
    bootstrap: Annotated[int, Flag("--bootstrap"), Free(), Field(ge=0)] = 1000
    """Resamples behind intervals; 0 gives none."""


class CsrSettings(Settings):
    """All tables of csr."""

    model_config = SettingsConfigDict(env_prefix="MOECTL_CSR__")

    data: DataSection = DataSection()
    model: ModelSection = ModelSection()
    concept: ConceptSection = ConceptSection()
    prototype: PrototypeSection = PrototypeSection()
    task: TaskSection = TaskSection()
    optim: CsrOptim = CsrOptim()
    schedule: ScheduleSection = ScheduleSection()
    train: CsrTrain = CsrTrain()
    eval: EvalSection = EvalSection()

    @model_validator(mode="after")
    def _task_fits_the_data(self) -> "CsrSettings":
        dataset, mode = self.data.dataset, self.data.task_mode
        if dataset == "synthetic" and mode == "multiclass":
            raise ValueError(
                "data.dataset is synthetic, whose images have several targets, but data.task_mode"
                " is multiclass"
            )
        if dataset == "isic" and mode == "multilabel":
            raise ValueError(
                "data.dataset is isic, whose images have one class each: it needs data.task_mode ="
                " multiclass and task.loss = ce"
            )
        return self

    @model_validator(mode="after")
    def _loss_fits_the_task(self) -> "CsrSettings":
        several = self.data.task_mode == "multilabel"
        if several == (self.task.loss == "ce"):
            raise ValueError(
                f"task.loss is {self.task.loss}, but data.task_mode is {self.data.task_mode}"
            )
        return self

    @model_validator(mode="after")
    def _boxes_of_both(self) -> "CsrSettings":
        given: list[Any] = [self.data.train_bbox_csv, self.data.test_bbox_csv]
        if any(given) != all(given):
            raise ValueError("data.train_bbox_csv and data.test_bbox_csv belong together")
        return self
