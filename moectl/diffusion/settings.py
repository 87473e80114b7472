"""Every knob of diffusion: images from noise by convolutional experts."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator
from pydantic_settings import SettingsConfigDict

from moectl.engine.sections import OptimSection, ScheduleSection, TrainSection
from moectl.engine.settings import Flag, Free, Section, Settings

Factors = Annotated[tuple[PositiveInt, ...], Field(min_length=1)]


class DataSection(Section):
    """The images."""

    dataset: Annotated[
        Literal["cifar10", "digits", "folder", "hub"], Flag("--dataset", "--data")
    ] = "cifar10"
    """What is learned: CIFAR-10, embedded digits, a folder of images, or a set of the hub."""
    root: Annotated[Path, Flag("--data-dir"), Free()] = Path("data")
    """Folder of the data set; of `folder`, that of the images or of their classes' folders."""
    name: Annotated[str, Flag("--hub-name")] = ""
    """Name of a data set of the hub, for instance uoft-cs/cifar10."""
    image_size: Annotated[int, Flag("--image-size"), Field(ge=4)] = 64
    """Side of the images, in pixels."""
    hflip: Annotated[bool, Flag("--hflip")] = True
    """Mirror training images at random; the embedded digits never are."""
    val_fraction: Annotated[float, Flag("--val-fraction"), Field(gt=0, lt=1)] = 0.05
    """Share of the images that are held out to measure, where there is no test set."""
    download: Annotated[bool, Free()] = True
    """Fetch a named public data set that is missing."""
    workers: Annotated[int, Flag("--workers"), Free(), Field(ge=0)] = 4
    """Loader processes; 0 reads in the main process."""


class ModelSection(Section):
    """The network."""

    channels: Annotated[int, Flag("--model-channels"), Field(ge=8, multiple_of=8)] = 128
    """Channels of the first level."""
    mults: Annotated[Factors, Flag("--channel-mults")] = (1, 2, 4, 8)
    """Factors of the levels, with commas."""
    time_dim: Annotated[int, Field(ge=2, multiple_of=2)] = 512
    """Width of the embedding of the time step."""
    class_dim: Annotated[int, Field(ge=1)] = 512
    """Width of the embedding of the class."""
    moe: Annotated[bool, Flag("--moe")] = True
    """Blocks of experts, or of dilated convolutions."""
    num_experts: Annotated[int, Flag("--num-experts"), Field(ge=1)] = 8
    """Experts of each block."""
    k_active: Annotated[int, Flag("--k-active"), Field(ge=1)] = 2
    """Experts that see an image."""
    freq: Annotated[bool, Flag("--freq")] = True
    """A frequency module at the bottleneck, or one more block."""
    dsconv: Annotated[bool, Flag("--dsconv")] = True
    """Depthwise-separable convolutions in the blocks, or dense ones."""
    compat: Annotated[Literal["none", "seed"], Flag("--compat")] = "none"
    """The corrected form, or the original's with its wiring mended."""
    dispatch: Literal["auto", "grouped", "stacked"] = "auto"
    """How experts run: each on its images, all at once with gathered weights, or the faster."""
    checkpointing: Annotated[bool, Flag("--checkpointing")] = False
    """Compute blocks again in the backward pass, to save memory."""

    @field_validator("mults", mode="before")
    @classmethod
    def _list_with_commas(cls, value: Any) -> Any:
        return value.split(",") if isinstance(value, str) else value

    @model_validator(mode="after")
    def _enough_experts(self) -> "ModelSection":
        if self.moe and self.k_active > self.num_experts:
            raise ValueError(
                f"model.k_active = {self.k_active} is more than model.num_experts ="
                f" {self.num_experts}"
            )
        return self


class ProcessSection(Section):
    """The diffusion process."""

    steps: Annotated[int, Flag("--timesteps"), Field(ge=2)] = 1000
    """Steps from an image to noise."""
    schedule: Annotated[Literal["linear", "cosine"], Flag("--beta-schedule")] = "linear"
    """Schedule of the variances."""
    prediction: Annotated[Literal["epsilon", "v_prediction"], Flag("--prediction")] = "epsilon"
    """What the network predicts: the noise, or the velocity."""


class LossSection(Section):
    """The loss."""

    weight: Annotated[Literal["none", "min_snr"], Flag("--loss-weight")] = "none"
    """Weight of the steps: all alike, or easy ones capped."""
    gamma: Annotated[float, Field(gt=0)] = 5.0
    """Signal-to-noise ratio of that cap."""
    balance: Annotated[Literal["switch", "variance", "none"], Flag("--balance")] = "switch"
    """What keeps experts in use; variance, the original's, does not."""
    lambda_load: Annotated[float, Flag("--lambda-load"), Field(ge=0)] = 0.01
    """Weight of that balance."""
    p_uncond: Annotated[float, Flag("--p-uncond"), Field(ge=0, lt=1)] = 0.1
    """Share of the labels that are hidden, so that guidance is possible; 0 for none."""


class DiffusionOptim(OptimSection):
    """The optimiser."""

    name: Annotated[Literal["sgd", "adam", "adamw"], Flag("--optimizer")] = "adamw"
    """Optimiser."""
    lr: Annotated[float, Flag("--lr"), Field(gt=0)] = 1e-4
    """Learning rate before the schedule."""
    clip_norm: Annotated[float, Field(ge=0)] = 1.0
    """Largest norm of the gradient; 0 turns clipping off."""


class DiffusionTrain(TrainSection):
    """How the training runs."""

    epochs: Annotated[int, Flag("--epochs"), Field(ge=1)] = 100
    """Passes over the training images."""
    batch_size: Annotated[int, Flag("--batch-size", "--bs"), Field(ge=1)] = 16
    """Images per optimiser update, over all processes and micro-batches."""
    seed: Annotated[int, Flag("--seed", "-s"), Field(ge=0)] = 0
    """Seed of the initial weights, the order of the samples and every random choice."""
    ema_decay: Annotated[float, Flag("--ema-decay"), Field(ge=0, lt=1)] = 0.9999
    """Decay of the averaged weights; 0 for none."""
    log_every: Annotated[int, Flag("--log-every"), Field(ge=0)] = 100
    """Updates between rows of running means, here and in metrics.csv; 0 for epoch ends only."""
    save_every: Annotated[int, Flag("--save-every"), Free(), Field(ge=1)] = 10
    """Epochs between weights files; the last epoch always writes one."""
    sample_every: Annotated[int, Flag("--sample-every"), Free(), Field(ge=0)] = 10
    """Epochs between pictures of samples; 0 for none."""


class SampleSection(Section):
    """How images are made."""

    sampler: Annotated[Literal["ddpm", "ddim", "dpmpp", "unipc"], Flag("--sampler")] = "dpmpp"
    """Which solver."""
    steps: Annotated[int, Flag("--steps"), Field(ge=1)] = 50
    """Network calls per image."""
    eta: Annotated[float, Flag("--eta"), Field(ge=0, le=1)] = 0.0
    """Noise of ddim: 0 for none, 1 for as much as ddpm."""
    guidance: Annotated[float, Flag("--cfg-scale"), Field(ge=0)] = 1.0
    """Guidance scale; 1 for none."""
    ema: Annotated[bool, Flag("--ema")] = True
    """Averaged weights, or those of the last update."""
    batch_size: Annotated[int, Flag("--batch"), Field(ge=1)] = 64
    """Images made at a time."""
    seed: Annotated[int, Flag("--sample-seed"), Field(ge=0)] = 0
    """Seed of the first image; the next ones have the next numbers."""


class EvalSection(Section):
    """What is measured after training."""

    features: Annotated[Literal["classifier", "inception", "none"], Flag("--features")] = (
        "classifier"
    )
    """What samples are compared by: a classifier trained on the same images, or Inception (extra
    `fid`); none measures loss and experts alone."""
    num: Annotated[int, Flag("--num"), Field(ge=10)] = 10_000
    """Samples that are made."""
    inception_weights: Annotated[Path | None, Flag("--inception-weights")] = None
    """Weights file of Inception; that of torch's hub if not given."""


class DiffusionSettings(Settings):
    """All tables of diffusion."""

    model_config = SettingsConfigDict(env_prefix="MOECTL_DIFFUSION__")

    data: DataSection = DataSection()
    model: ModelSection = ModelSection()
    process: ProcessSection = ProcessSection()
    loss: LossSection = LossSection()
    optim: DiffusionOptim = DiffusionOptim()
    schedule: ScheduleSection = ScheduleSection()
    train: DiffusionTrain = DiffusionTrain()
    sample: SampleSection = SampleSection()
    eval: EvalSection = EvalSection()

    def ties_epochs(self, command: str) -> bool:
        """Whether the number of epochs shapes what is done before the last of them.

        Variants are compared after equally many.
        """
        return command == "ablate"

    @model_validator(mode="after")
    def _size_fits_the_levels(self) -> "DiffusionSettings":
        factor = 2 ** len(self.model.mults)
        if self.data.image_size % factor:
            raise ValueError(
                f"data.image_size = {self.data.image_size}: expected a multiple of {factor} for"
                f" {len(self.model.mults)} levels"
            )
        return self
