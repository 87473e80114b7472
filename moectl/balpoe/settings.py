"""Every knob of balpoe: balanced product of calibrated experts."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator
from pydantic_settings import SettingsConfigDict

from moectl.balpoe.taus import tau_values
from moectl.engine.sections import OptimSection, ScheduleSection, TrainSection
from moectl.engine.settings import Flag, Free, Section, Settings


def _numbers(value: Any) -> Any:
    """Split the text of an option, `0.1, 0.2` or `0.1;0.2`."""
    return value.replace(",", ";").split(";") if isinstance(value, str) and value else value or ()


Numbers = Annotated[tuple[float, ...], BeforeValidator(_numbers)]
Rates = Annotated[tuple[Annotated[float, Field(ge=0, lt=1)], ...], BeforeValidator(_numbers)]
Costs = Annotated[tuple[Annotated[float, Field(ge=0, le=1)], ...], BeforeValidator(_numbers)]


POSTERIOR = r"^(poe|mixture|single:[0-9]+)$"


class DataSection(Section):
    """The images."""

    dataset: Annotated[
        Literal["digits", "cifar10", "cifar100", "imagenet_lt", "inat18", "list", "synthetic"],
        Flag("--dataset"),
    ] = "cifar100"
    """Data set; `list` reads `path label` lines over an image folder."""
    root: Annotated[Path, Flag("--data-dir", "--root"), Free()] = Path("data")
    """Folder that holds the data set, or receives it."""
    images: Annotated[Path | None, Flag("--images")] = None
    """Image folder of the list files; data.root if not given."""
    train_list: Path | None = None
    """List file of the training images, for `list` and where the usual name does not fit."""
    val_list: Path | None = None
    """List file of the validation images; without one a part of the test images is held out."""
    test_list: Path | None = None
    """List file of the test images."""
    imbalance_ratio: Annotated[float, Flag("--imbalance-ratio"), Field(ge=1)] = 100.0
    """Images of the largest class over images of the smallest; 1 keeps the classes balanced.
    List files are taken as they stand."""
    profile: Literal["exp", "step", "reverse"] = "exp"
    """How class sizes fall: exponential, in one step, or exponential from the last class on.
    List files are taken as they stand."""
    augment: Annotated[
        Literal["standard", "autoaugment", "trivial", "randaugment"], Flag("--augment")
    ] = "standard"
    """Random transforms of the training images."""
    cutout: Annotated[bool, Flag("--cutout")] = False
    """Blank a 16 x 16 square of every training image, as the last transform."""
    image_size: Annotated[int, Field(ge=0)] = 0
    """Side in pixels that the digits are enlarged to; 0 keeps the native size of any data set."""
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of the held-out images that selects the best epoch; the rest is the test set."""
    workers: Annotated[int, Flag("--workers"), Free(), Field(ge=0)] = 4
    """Loader processes for images in files; data in memory needs none."""
    download: Annotated[bool, Flag("--download"), Free()] = True
    """Fetch a public data set that is not there yet; MOECTL_OFFLINE=1 forbids it anyway."""


class ModelSection(Section):
    """The network."""

    arch: Annotated[Literal["resnet32", "resnet50", "resnext50"], Flag("--arch")] = "resnet32"
    """Backbone; the small one is for 32 x 32 images."""
    experts: Annotated[int, Flag("--experts", "--num-experts"), Field(ge=1, le=16)] = 3
    """Number of experts on the shared trunk."""
    reduce_dimension: Annotated[bool, Flag("--reduce-dimension")] = False
    """Narrow the layers of the experts by a quarter."""
    layer2_dimension: Annotated[int, Flag("--layer2-dimension"), Field(ge=0)] = 0
    """Channels of layer 2; 0 takes the standard or reduced width."""
    layer3_dimension: Annotated[int, Flag("--layer3-dimension"), Field(ge=0)] = 0
    """Channels of layer 3; 0 takes the standard or reduced width."""
    layer4_dimension: Annotated[int, Flag("--layer4-dimension"), Field(ge=0)] = 0
    """Channels of layer 4 of the large backbones; 0 takes the standard or reduced width."""
    share_layer2: Annotated[bool, Flag("--share-layer2")] = False
    """One layer 2 for all experts."""
    share_layer3: Annotated[bool, Flag("--share-layer3")] = False
    """One layer 3 for all experts; needs share_layer2."""
    use_norm: Annotated[bool, Flag("--use-norm")] = True
    """Cosine classifier; off takes a linear one with bias."""
    norm_scale: Annotated[float, Flag("--norm-scale"), Field(gt=0)] = 30.0
    """Factor on the cosines."""
    shortcut: Literal["A", "B"] = "A"
    """Shortcut where the width changes: zero-padding, or a 1 x 1 convolution."""

    @model_validator(mode="after")
    def _sharing_is_nested(self) -> "ModelSection":
        if self.share_layer3 and not self.share_layer2:
            raise ValueError("model.share_layer3 needs model.share_layer2")
        return self


class LossSection(Section):
    """The priors of the experts, and the mixing of inputs."""

    tau_list: Annotated[str, Flag("--tau-list")] = "0;1;2"
    """Prior strength of each expert: a list, or `limits` or `uniform` from tau_min to tau_max."""
    tau_min: Annotated[float, Flag("--tau-min")] = 0.0
    """Lower end for `limits` and `uniform`."""
    tau_max: Annotated[float, Flag("--tau-max")] = 2.0
    """Upper end for `limits` and `uniform`."""
    mix: Annotated[
        Literal["default", "mixup", "cutmix", "mixup_cutmix"], Flag("--combiner-type", "--mix")
    ] = "mixup"
    """How pairs of images are combined; `default` leaves them alone."""
    mixup_alpha: Annotated[float, Flag("--mixup-alpha"), Field(ge=0)] = 0.4
    """Beta(alpha, alpha) of the mixing weight of mixup; 0 turns it off."""
    cutmix_alpha: Annotated[float, Flag("--cutmix-alpha"), Field(ge=0)] = 1.0
    """Beta(alpha, alpha) of the kept area of cutmix; 0 turns it off."""
    finetuning_start: Annotated[int, Flag("--finetuning-start"), Field(ge=0)] = 0
    """Epoch from which images are no longer mixed; 0 mixes to the end."""

    @field_validator("tau_list", mode="before")
    @classmethod
    def _list_as_text(cls, value: Any) -> Any:
        return ";".join(str(item) for item in value) if isinstance(value, list | tuple) else value


class BalpoeOptim(OptimSection):
    """The optimiser."""

    lr: Annotated[float, Flag("--lr"), Field(gt=0)] = 0.1
    """Learning rate before the schedule."""
    weight_decay: Annotated[float, Flag("--weight-decay", "--wd"), Field(ge=0)] = 5e-4
    """Weight decay on all parameters; 0 turns it off."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum of sgd, ignored by the others; 0 turns it off."""
    nesterov: bool = True
    """Nesterov's form of the momentum of sgd."""


class BalpoeSchedule(ScheduleSection):
    """The learning rate over the epochs."""

    name: Annotated[Literal["constant", "multistep", "cosine"], Flag("--schedule")] = "multistep"
    """Shape of the learning rate."""
    warmup: Annotated[int, Flag("--warmup"), Field(ge=0)] = 5
    """Epochs of linear warm-up; 0 turns it off."""
    step1: Annotated[int, Flag("--step1"), Field(ge=0)] = 160
    """Epoch of the first drop of multistep."""
    step2: Annotated[int, Flag("--step2"), Field(ge=0)] = 180
    """Epoch of the second drop of multistep."""


class BalpoeTrain(TrainSection):
    """How the training runs."""

    epochs: Annotated[int, Flag("--epochs"), Field(ge=1)] = 200
    """Passes over the training data."""
    save_period: Annotated[int, Flag("--save-period"), Free(), Field(ge=1)] = 50
    """Epochs between the weights files checkpoint-epochN.pth; the last epoch always has one."""


class PluginSection(Section):
    """The rule that says when to reject."""

    posterior: Annotated[str, Flag("--posterior"), Field(pattern=POSTERIOR)] = "poe"
    """How experts are combined: `poe`, `mixture`, or `single:E` for expert E alone."""
    expert_weights: Annotated[str, Flag("--expert-weights")] = "equal"
    """Shares of the experts: `equal`, `grid` (searched on validation images) or a list."""
    label_prior: Annotated[str, Flag("--label-prior")] = "train"
    """Class shares of the images to be judged: `train`, `uniform`, or a file of numbers."""
    groups: Annotated[str, Flag("--groups")] = "head_tail"
    """Groups of equal right: `head_tail`, `shots`, `class`, `quantile:Q`, or a JSON/TOML file."""
    tail_threshold: Annotated[int, Flag("--tail-threshold"), Field(ge=0)] = 20
    """Most training images of a class in the tail."""
    objective: Annotated[str, Flag("--objective")] = "balanced"
    """Error to lower: `balanced` over groups, of the `worst` group, or a list of weights."""
    rates: Annotated[Rates, Flag("--rates")] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
    """Target rejection rates, each with a rule of its own."""
    costs: Annotated[Costs, Flag("--costs")] = ()
    """Costs of a rejection in units of an error, each with a rule of its own."""
    mu_method: Annotated[Literal["fixed-point", "grid"], Flag("--mu-method")] = "fixed-point"
    """Where the multipliers come from: their own equation, or a search over `lambdas`."""
    lambdas: Annotated[Numbers, Field(min_length=1)] = (0.0, 1.0, -1.0, 6.0, -6.0, 11.0, -11.0)
    """Candidates of the grid: multiplier of a further group, as the tail, less the first's."""
    iterations: Annotated[int, Field(ge=1)] = 30
    """Steps towards consistent acceptance shares."""
    rounds: Annotated[int, Field(ge=1)] = 25
    """Updates of the group weights under the worst-group objective."""
    step_size: Annotated[float, Field(gt=0)] = 1.0
    """Exponent of those updates per unit of error."""
    keep: Literal["best", "last"] = "best"
    """Round whose rule is kept under the worst-group objective."""

    @field_validator("expert_weights", "objective", mode="before")
    @classmethod
    def _list_as_text(cls, value: Any) -> Any:
        return ";".join(map(str, value)) if isinstance(value, list | tuple) else value

    @model_validator(mode="after")
    def _texts_that_are_lists(self) -> "PluginSection":
        self._shares("expert_weights", self.expert_weights, ("equal", "grid"))
        self._shares("objective", self.objective, ("balanced", "worst"))
        if not (self.rates or self.costs):
            raise ValueError("plugin.rates and plugin.costs are both empty")
        return self

    @staticmethod
    def _shares(name: str, text: str, words: tuple[str, ...]) -> tuple[float, ...] | None:
        """Return the numbers of a list with sum 1, None for one of the words."""
        if text in words:
            return None
        try:
            values = tuple(float(part) for part in _numbers(text))
        except ValueError:
            values = ()
        if not values or min(values) < 0 or not 0 < sum(values) < float("inf"):
            known = " or ".join(words)
            raise ValueError(f"plugin.{name} is {text!r}, expected {known}, or numbers such as 1;2")
        return tuple(value / sum(values) for value in values)

    @property
    def expert_shares(self) -> tuple[float, ...] | None:
        """The weights of the experts, with sum 1, where they are given as a list."""
        return self._shares("expert_weights", self.expert_weights, ("equal", "grid"))

    @property
    def group_shares(self) -> tuple[float, ...] | None:
        """The weights of the groups, with sum 1, where they are given as a list."""
        return self._shares("objective", self.objective, ("balanced", "worst"))


class EvalSection(Section):
    """What is measured after training."""

    batch_size: Annotated[int, Flag("--eval-batch-size"), Field(ge=1)] = 500
    """Images per forward pass."""
    bins: Annotated[int, Flag("--bins"), Free(), Field(ge=1)] = 15
    """Bins of the calibration errors."""
    shifts: Annotated[tuple[Annotated[float, Field(ge=1)], ...], Free()] = (
        50.0,
        25.0,
        10.0,
        5.0,
        2.0,
    )
    """Imbalance ratios of the shifted test sets, forward and backward; empty for none."""
    bootstrap: Annotated[int, Free(), Field(ge=0)] = 1000
    """Resamples of the test images behind the intervals of areas; 0 gives none."""
    trials: Annotated[int, Free(), Field(ge=1)] = 5
    """Divisions into validation and test images over which areas are averaged."""


class BalpoeSettings(Settings):
    """All tables of balpoe."""

    model_config = SettingsConfigDict(env_prefix="MOECTL_BALPOE__")

    data: DataSection = DataSection()
    model: ModelSection = ModelSection()
    loss: LossSection = LossSection()
    optim: BalpoeOptim = BalpoeOptim()
    schedule: BalpoeSchedule = BalpoeSchedule()
    train: BalpoeTrain = BalpoeTrain()
    plugin: PluginSection = PluginSection()
    eval: EvalSection = EvalSection()

    @model_validator(mode="after")
    def _a_tau_for_every_expert(self) -> "BalpoeSettings":
        try:
            _ = self.taus
        except ValueError as error:
            raise ValueError(f"loss.{error} (model.experts = {self.model.experts})") from None
        return self

    @property
    def taus(self) -> tuple[float, ...]:
        """The prior strength of each expert."""
        loss = self.loss
        return tau_values(loss.tau_list, self.model.experts, loss.tau_min, loss.tau_max)
