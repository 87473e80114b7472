"""Every knob of controller: a policy that answers within a latency budget."""

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator
from pydantic_settings import SettingsConfigDict

from moectl.engine.sections import OptimSection, TrainSection
from moectl.engine.settings import Flag, Free, Section, Settings

DatasetName = Literal[
    "text_vqa", "coco_2014_vqa", "okvqa", "coco_caption", "jsonl", "easy_vqa", "synth_vqa"
]
Policy = Literal[
    "controller", "static_full", "static_medium", "static_min", "random", "lut", "importance",
    "token_only", "depth_only", "width_only", "oracle_table",
]  # fmt: skip


def _commas(value: Any) -> Any:
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


class DataSection(Section):
    """The questions."""

    dataset: Annotated[
        tuple[DatasetName, ...],
        Flag("--dataset", "--dataset-names"),
        Field(min_length=1),
    ] = ("text_vqa",)
    """Sets of questions, with commas: text_vqa, coco_2014_vqa, okvqa or coco_caption of the hub,
    easy_vqa or jsonl of this disk, synth_vqa drawn here."""
    root: Annotated[Path, Flag("--data-dir"), Free()] = Path("data")
    """Folder of easy_vqa, or of the images that a jsonl file names."""
    file: Annotated[Path | None, Flag("--data")] = None
    """Questions of jsonl, one a line."""
    train_samples: Annotated[int, Flag("--train-samples"), Field(ge=1)] = 200
    """Questions to train on."""
    val_samples: Annotated[int, Flag("--val-samples"), Field(ge=1)] = 50
    """Questions to validate on; no image of theirs is trained on."""
    test_samples: Annotated[int, Flag("--num-samples"), Field(ge=1)] = 100
    """Questions to evaluate on, with images of their own."""
    sources: tuple[str, ...] = ()
    """Other names on the hub, as text_vqa=owner/name."""

    _split = field_validator("dataset", "sources", mode="before")(_commas)

    @field_validator("sources")
    @classmethod
    def _pairs(cls, sources: tuple[str, ...]) -> tuple[str, ...]:
        for source in sources:
            name, _, repository = source.partition("=")
            if name not in get_args(DatasetName) or not repository:
                raise ValueError(f"{source!r}: expected a set and a name, as text_vqa=owner/name")
        return sources


class BackboneSection(Section):
    """The network that answers, which stays as it is."""

    model: Annotated[str, Flag("--model", "--model-path")] = "tiny"
    """A name on the hub, a folder, a run of toy, tiny or nano (random weights), or sim (none)."""
    dtype: Annotated[Literal["auto", "float32", "bfloat16"], Flag("--dtype")] = "auto"
    """Numbers it computes with; auto: float32 on a CPU, else as its weights were saved."""
    experts: Literal["auto", "eager", "grouped_mm", "batched_mm"] = "auto"
    """How its experts run; auto: eager on a CPU, where only that gains from fewer of them."""
    max_new_tokens: Annotated[int, Flag("--max-new-tokens"), Field(ge=0)] = 0
    """Longest answer; 0: 64 for text_vqa and coco_caption, else 16."""


class PolicySection(Section):
    """The controller."""

    hidden: Annotated[int, Flag("--hidden"), Field(ge=1)] = 256
    """Width of its layers."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Dropout while it learns; never while it chooses."""
    budget_dim: Annotated[int, Field(ge=1)] = 2048
    """Width of the budget's code."""
    budget_low: Annotated[float, Field(ge=0)] = 50.0
    """Budget that is coded as nothing."""
    budget_high: Annotated[float, Field(gt=0)] = 500.0
    """Budget that is coded as all."""
    budget_scale: Annotated[float, Field(gt=0)] = 1000.0
    """Radians that the code turns between the two; the original has 1, where all codes look
    alike."""
    sinusoidal: bool = True
    """Code the budget by sines, or by one linear layer."""
    blocks: Annotated[
        Literal["auto", "learned", "importance", "prefix"], Flag("--block-policy")
    ] = "auto"
    """Who chooses the blocks once their number is chosen: the controller, scores of importance, or
    the first ones run; auto: the controller."""
    top_k: Annotated[Literal["per_block", "shared"], Flag("--top-k")] = "per_block"
    """Choose a number of experts for each block, or one for all; the latter makes so few plans
    that most are soon known."""
    importance: Annotated[Path | None, Flag("--importance", "--importance-scores-file")] = None
    """Scores of the blocks, a JSON file; with learned blocks they start the controller's own."""

    @model_validator(mode="after")
    def _a_range(self) -> "PolicySection":
        if self.budget_low >= self.budget_high:
            raise ValueError(
                f"policy.budget_low = {self.budget_low} must be below policy.budget_high ="
                f" {self.budget_high}"
            )
        return self


class BudgetSection(Section):
    """The latency budgets that are trained for."""

    mode: Annotated[Literal["absolute", "relative", "auto"], Flag("--budget-mode")] = "absolute"
    """low and high are milliseconds, shares of the full plan's latency, or taken from tables."""
    low: Annotated[float, Flag("--budget-min"), Field(gt=0)] = 170.0
    """Smallest budget."""
    high: Annotated[float, Flag("--budget-max"), Field(gt=0)] = 380.0
    """Largest budget."""

    @model_validator(mode="after")
    def _a_range(self) -> "BudgetSection":
        if self.low > self.high:
            raise ValueError(f"budget.low = {self.low} is above budget.high = {self.high}")
        return self


class RewardSection(Section):
    """What a plan is worth."""

    kind: Annotated[Literal["composite", "hinge"], Flag("--reward")] = "composite"
    """The original's sum, whose optimum hardly uses the budget; or accuracy less what a missed
    budget costs."""
    accuracy: Annotated[float, Field(ge=0)] = 1.0
    """Weight of accuracy."""
    latency: Annotated[float, Field(ge=0)] = 0.5
    """Weight of the sigmoid of latency over budget, of composite."""
    over: Annotated[float, Field(ge=0)] = 10.0
    """Weight of the square of what is above the budget."""
    cost: Annotated[float, Field(ge=0)] = 0.05
    """Weight of the share of the network that is used, of composite."""
    under: Annotated[float, Field(ge=0)] = 0.1
    """Weight of what is left of the budget, of composite."""
    margin: Annotated[float, Field(ge=0, lt=1)] = 0.03
    """Share of the budget that is kept free, of hinge."""
    violation: Annotated[float, Field(ge=0)] = 0.1
    """Cost of any missed budget, of hinge."""


class LatencySection(Section):
    """How long an answer takes."""

    source: Annotated[Literal["measured", "table", "flops"], Flag("--latency-source")] = "measured"
    """Time every answer, predict its time from tables, or count its work: budgets are GFLOP
    then."""
    objective: Annotated[Literal["total", "ttft", "prefill", "per_token"], Flag("--objective")] = (
        "total"
    )
    """Time that is held against the budget: of the answer, to its first token, of the prefill, or
    of each further token."""
    clock: Annotated[Literal["wall", "cpu"], Flag("--clock")] = "wall"
    """Clock on the wall, or processor time, for machines that others use too."""
    warmup: Annotated[int, Flag("--warmup"), Field(ge=0)] = 3
    """Answers of each tier before the first that counts."""
    repeats: Annotated[int, Field(ge=1)] = 1
    """Times that an answer is timed; the median counts."""
    tables: Annotated[str, Flag("--tables")] = ""
    """Run of profile, or its folder: lookup table, fitted latency, importance of the blocks."""

    @model_validator(mode="after")
    def _work_is_of_the_whole_answer(self) -> "LatencySection":
        if self.source == "flops" and self.objective != "total":
            raise ValueError(
                f"latency.source = flops counts whole answers: latency.objective ="
                f" {self.objective} must be total"
            )
        return self


class GrpoSection(Section):
    """Group-relative policy optimisation."""

    group_size: Annotated[int, Flag("--group-size"), Field(ge=2)] = 5
    """Plans drawn for each question."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """What an advantage is divided by: the deviation of its group, of all that one process answers
    at once, or nothing."""
    inner_iterations: Annotated[int, Flag("--inner-iterations"), Field(ge=1)] = 1
    """Updates from the same answers, with clipped ratios."""
    clip: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Clip of the ratios."""
    kl_coef: Annotated[float, Flag("--kl-coef"), Field(ge=0)] = 0.0
    """Weight of the divergence from the policy that training began with."""
    entropy_coef: Annotated[float, Flag("--entropy-coef"), Field(ge=0)] = 0.003
    """Weight of the entropy of each head; the original has none, and may collapse to one plan."""
    warm_start: Annotated[Literal["none", "lut"], Flag("--warm-start")] = "none"
    """Begin by copying the lookup table, which costs no answers."""
    clone_steps: Annotated[int, Field(ge=1)] = 300
    """Updates of that."""
    init_from: Annotated[Path | None, Flag("--init-from", "--load-stage1-checkpoint")] = None
    """Weights of a controller to begin with."""
    plateau_factor: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Factor on the learning rate when validation no longer improves."""
    plateau_patience: Annotated[int, Field(ge=0)] = 5
    """Epochs without improvement before that."""
    keep_last: Annotated[int, Flag("--keep-last"), Field(ge=1)] = 3
    """Newest weights files to keep, beside the best."""


class ControllerOptim(OptimSection):
    """The optimiser."""

    name: Annotated[Literal["sgd", "adam", "adamw"], Flag("--optimizer")] = "adam"
    """Optimiser."""
    lr: Annotated[float, Flag("--lr"), Field(gt=0)] = 1e-4
    """Learning rate."""
    weight_decay: Annotated[float, Flag("--weight-decay", "--wd"), Field(ge=0)] = 1e-5
    """Weight decay on all parameters; 0 turns it off."""
    clip_norm: Annotated[float, Field(ge=0)] = 1.0
    """Largest norm of the gradient; 0 turns clipping off."""


class ControllerTrain(TrainSection):
    """How the training runs."""

    epochs: Annotated[int, Flag("--epochs", "--num-epochs"), Field(ge=1)] = 100
    """Passes over the questions."""
    batch_size: Annotated[int, Flag("--batch-size", "--bs"), Field(ge=1)] = 1
    """Questions per update, over all processes and micro-batches."""
    accumulate: Annotated[int, Flag("--grad-accum"), Field(ge=1)] = 1
    """Micro-batches that each batch is cut into."""
    seed: Annotated[int, Flag("--seed", "-s"), Field(ge=0)] = 42
    """Seed of the questions, the initial weights, their order and every random choice."""
    precision: Annotated[Literal["auto", "no", "bf16", "fp16"], Flag("--precision")] = "no"
    """Mixed precision of the controller, which is too small to gain from it."""
    wandb_project: Annotated[str, Flag("--wandb-project")] = "molmo-controller"
    """Project at Weights & Biases; empty for moectl-controller."""


class ProfileSection(Section):
    """What is measured about plans before a controller is trained."""

    what: Annotated[
        tuple[Literal["importance", "grid", "latency", "overhead"], ...],
        Flag("--what"),
        Field(min_length=1),
    ] = ("importance", "grid", "latency", "overhead")
    """Parts, with commas."""
    samples: Annotated[int, Flag("--samples"), Field(ge=1)] = 50
    """Validation questions that each plan answers."""
    method: Annotated[Literal["drop", "bi", "kl"], Flag("--method")] = "drop"
    """Importance of a block: accuracy lost without it, how much it changes its input, or how much
    the next token's distribution changes without it."""
    beam: Annotated[int, Flag("--beam"), Field(ge=1)] = 3
    """Sets of removed blocks that the search goes on with."""
    max_remove: Annotated[int, Flag("--max-remove"), Field(ge=0)] = 0
    """Largest such set; 0 for no search."""
    top_ks: Annotated[tuple[PositiveInt, ...], Flag("--top-ks")] = ()
    """Numbers of experts of the grid, with commas; empty: smallest, middle and largest."""
    plans: Annotated[int, Flag("--plans"), Field(ge=8)] = 40
    """Random plans that latency is fitted to."""
    repeats: Annotated[int, Flag("--repeats"), Field(ge=1)] = 5
    """Times that each answer is timed; the median counts."""

    _split = field_validator("what", "top_ks", mode="before")(_commas)


class EvalSection(Section):
    """How a controller is measured."""

    policies: Annotated[tuple[Policy, ...], Flag("--baseline"), Field(min_length=1)] = (
        "controller", "static_full", "static_medium", "static_min", "random", "lut",
    )  # fmt: skip
    """Policies to compare, with commas."""
    budgets: Annotated[tuple[PositiveFloat, ...], Flag("--budget")] = ()
    """Budgets, with commas; empty: eight over the range that was trained for."""
    budget_frac: Annotated[tuple[PositiveFloat, ...], Flag("--budget-frac")] = ()
    """Budgets as shares of the full plan's latency, with commas."""
    bootstrap: Annotated[int, Free(), Field(ge=100)] = 1000
    """Resamples of the confidence intervals."""
    save_predictions: Annotated[bool, Flag("--save-predictions")] = True
    """Write every answer."""

    _split = field_validator("policies", "budgets", "budget_frac", mode="before")(_commas)


class ToySection(Section):
    """The small network that is taught to answer, so that plans have something to trade."""

    size: Annotated[Literal["nano", "tiny"], Flag("--size")] = "nano"
    """Size of the network."""
    text: Annotated[Literal["olmoe", "qwen3_moe", "dense"], Flag("--text")] = "olmoe"
    """Kind of its text network."""
    train_samples: Annotated[int, Flag("--toy-train"), Field(ge=1)] = 4000
    """Questions it learns from."""
    val_samples: Annotated[int, Flag("--toy-val"), Field(ge=1)] = 400
    """Questions it is measured on."""
    epochs: Annotated[int, Flag("--epochs"), Field(ge=1)] = 10
    """Passes over them."""
    batch_size: Annotated[int, Flag("--batch-size", "--bs"), Field(ge=1)] = 32
    """Questions per update."""
    lr: Annotated[float, Flag("--lr"), Field(gt=0)] = 1e-3
    """Learning rate, after a warm-up and before a cosine."""
    depth_drop: Annotated[float, Flag("--depth-drop"), Field(ge=0, lt=1)] = 0.1
    """Probability of skipping a block, so that it learns to do without."""


class ControllerSettings(Settings):
    """All tables of controller."""

    model_config = SettingsConfigDict(env_prefix="MOECTL_CONTROLLER__")

    data: DataSection = DataSection()
    backbone: BackboneSection = BackboneSection()
    policy: PolicySection = PolicySection()
    budget: BudgetSection = BudgetSection()
    reward: RewardSection = RewardSection()
    latency: LatencySection = LatencySection()
    grpo: GrpoSection = GrpoSection()
    optim: ControllerOptim = ControllerOptim()
    train: ControllerTrain = ControllerTrain()
    profile: ProfileSection = ProfileSection()
    eval: EvalSection = EvalSection()
    toy: ToySection = ToySection()

    @model_validator(mode="after")
    def _inner_iterations_are_whole(self) -> "ControllerSettings":
        if self.grpo.inner_iterations > 1 and self.train.accumulate > 1:
            raise ValueError("grpo.inner_iterations > 1 needs train.accumulate = 1")
        return self
