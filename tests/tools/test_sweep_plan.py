import json
from collections.abc import Callable
from pathlib import Path

import pytest

from moectl import cli
from moectl.engine.errors import UserError
from moectl.tools import sweep_plan
from moectl.tools.sweep_plan import MAX_CELLS, read_plan, short, words_of

Write = Callable[..., Path]


def complaint(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_plan(path)
    return caught.value.message


def test_cells_are_the_grid_times_the_seeds(sweep_file: Write) -> None:
    grid = (
        "[settings]\ntrain.epochs = 3\n[grid]\noptim.lr = [0.1, 0.2]\noptim.name = ['sgd', 'adam']"
    )
    plan = read_plan(sweep_file(grid, seeds=[4, 5], presets=["digits_ir20"]))
    assert [cell.name for cell in plan.cells] == [
        f"lr={lr},name={name},seed={seed}"
        for lr in (0.1, 0.2) for name in ("sgd", "adam") for seed in (4, 5)
    ]  # fmt: skip
    assert plan.cells[-1].point == {"optim.lr": 0.2, "optim.name": "adam"}
    assert plan.cells[-1].seed == 5
    assert plan.cells[-1].words == [
        "balpoe", "train", "--preset=digits_ir20", "--set=train.epochs=3", "--set=optim.lr=0.2",
        "--set=optim.name=adam", "--set=train.seed=5",
    ]  # fmt: skip
    assert plan.folder == Path("runs/sweep/s")
    assert plan.settings["train.epochs"] == 3
    assert plan.settings["data.imbalance_ratio"] == 20
    assert not {"optim.lr", "optim.name", "train.seed"} & set(plan.settings)


def test_a_sweep_may_have_seeds_alone(sweep_file: Write) -> None:
    plan = read_plan(sweep_file())
    assert [cell.name for cell in plan.cells] == ["seed=1", "seed=2", "seed=3"]


def test_the_words_of_a_cell_are_a_command_that_is_understood(
    sweep_file: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    tables = "[settings]\ntrain.tensorboard = false\n[grid]\noptim.name = ['sgd']"
    words = read_plan(sweep_file(tables, command="controller toy --cpu")).cells[0].words
    assert cli._run([*words, "--dry-run", "--json"]) == 0
    settings = json.loads(capsys.readouterr().out)["settings"]
    assert settings["optim.name"] == {"value": "sgd", "from": "--set"}
    assert settings["train.tensorboard"] == {"value": False, "from": "--set"}
    assert settings["train.seed"] == {"value": 1, "from": "--set"}


@pytest.mark.parametrize(
    ("value", "word"),
    [
        ("plain", "plain"), ("a b", "a b"), (" edge", '" edge"'), ("[x", '"[x"'), ('"q', '"\\"q"'),
        (True, "true"), (1e-5, "1e-05"), ([1, 2], "[1, 2]"), (["é"], '["é"]'),
    ],
)  # fmt: skip
def test_values_are_written_so_that_set_reads_them_back(value: object, word: str) -> None:
    from moectl.engine.settings import literal

    text = words_of({"x": value}).removeprefix("x=")
    assert text == word
    assert literal(text, "") == (value if isinstance(value, str | list) else word)


def test_options_of_the_command_stay_and_are_settings_of_all(sweep_file: Write) -> None:
    plan = read_plan(sweep_file(command="moectl balpoe train --cpu --epochs 7 --weight_decay 0.5"))
    assert plan.command == "balpoe train --cpu --epochs 7 --weight_decay 0.5"
    assert plan.settings["train.epochs"] == 7
    assert plan.settings["optim.weight_decay"] == 0.5


def test_keys_with_the_same_end_are_written_in_full() -> None:
    assert short(["optim.lr", "data.name", "loss.name"]) == ["lr", "data.name", "loss.name"]
    assert short(["eval.seed"]) == ["eval.seed"]


def test_names_of_cells_are_safe_for_file_systems(sweep_file: Write) -> None:
    values = ["a/b", "a b", "../x", "y" * 300, "é"]
    tables = f"[grid]\ndata.root = {json.dumps(values)}"
    names = [cell.name for cell in read_plan(sweep_file(tables, seeds=[1])).cells]
    assert len(set(names)) == len(values)
    assert all(len(name) <= 90 and "/" not in name and name.isascii() for name in names)
    assert all(name.startswith("root=") and name.endswith(",seed=1") for name in names)


def test_a_name_of_eighty_letters_is_not_shortened(sweep_file: Write) -> None:
    value = "y" * (80 - len("root="))
    tables = f"[grid]\ndata.root = ['{value}', '{value}y']"
    whole, cut = [cell.name for cell in read_plan(sweep_file(tables, seeds=[1])).cells]
    assert whole == f"root={value},seed=1"
    assert len(cut) < len(whole)


def test_the_environment_counts_as_in_a_single_run(
    sweep_file: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOECTL_BALPOE__TRAIN__EPOCHS", "9")
    assert read_plan(sweep_file()).settings["train.epochs"] == 9


def test_a_folder_or_a_name_may_be_given(sweep_file: Write) -> None:
    assert read_plan(sweep_file(file="a.toml")).folder == Path("runs/sweep/a")
    path = sweep_file(name="b")
    assert read_plan(path).folder == Path("runs/sweep/b")
    assert read_plan(path, Path("there")).folder == Path("there")


@pytest.mark.parametrize(
    ("keys", "tables", "message"),
    [
        ({"seeds": None}, "", "s.toml: seeds: missing, for instance seeds = [1, 2, 3]"),
        ({"command": None}, "", 's.toml: command: missing, for instance command = "balpoe train"'),
        ({"sede": 1}, "", "s.toml: sede: no such key of a sweep; did you mean seeds?"),
        ({"seeds": []}, "", "s.toml: seeds = []: list should have at least 1"),
        ({"seeds": ["a"]}, "", "s.toml: seeds.0 = 'a': input should be a valid integer"),
        ({"seeds": [-1]}, "", "s.toml: seeds.0 = -1: input should be greater than or equal to 0"),
        ({"seeds": [1, 1]}, "", "s.toml: seed=1 and seed=1: the same training twice"),
        ({"command": "balpoe trian"}, "", "s.toml: command: 'balpoe trian': no such command; did"
         " you mean balpoe train?"),
        ({"command": "runs list"}, "", "s.toml: command: 'runs list': no such command"),
        ({"command": ""}, "", "s.toml: command: '': no such command"),
        ({"command": "balpoe train 'x"}, "", "s.toml: command: \"balpoe train 'x\": No closing"),
        ({"command": "balpoe eval"}, "", "s.toml: command: 'balpoe eval': balpoe eval trains"
         " nothing"),
        ({"command": "balpoe train --lrr 1"}, "", "s.toml: command: No such option: --lrr"),
        ({"command": "balpoe train --help"}, "", "s.toml: command: --help is not for here"),
        ({"command": "balpoe train -p x"}, "", "s.toml: command: --preset is not for here:"
         ' presets = ["NAME"]'),
        ({"command": "balpoe train --set a=b"}, "", "s.toml: command: --set is not for here"),
        ({"command": "balpoe train --out x"}, "", "s.toml: command: --out is not for here"),
        ({"command": "balpoe train --resume x"}, "", "s.toml: command: --resume is not for here"),
        ({"command": "balpoe train -n"}, "", "s.toml: command: --dry-run is not for here"),
        ({"command": "balpoe train --json"}, "", "s.toml: command: --json is not for here"),
        ({"command": "csr train --output-dir x"}, "", "s.toml: command: --output-dir is not for"),
        ({"command": "balpoe train --lr 1"}, "[grid]\noptim.lr = [1]", "s.toml: grid: optim.lr:"
         " an option of the command sets it already"),
        ({"command": "balpoe train --lr=-1"}, "", "s.toml: --lr = -1.0: input should"),
        ({"presets": ["digits_ir2"]}, "", "s.toml: presets: digits_ir2: no such preset for balpoe;"
         " did you mean digits_ir20?"),
        ({"name": "../x"}, "", "s.toml: sweep name '../x' is not a usable name"),
        ({}, "[settings]\noptim.lrr = 1", "s.toml: settings: optim.lrr: no such setting; did you"
         " mean optim.lr?"),
        ({}, "[grid]\noptim.lrr = [1]", "s.toml: grid: optim.lrr: no such setting; did you mean"),
        ({}, "[settings]\noptim.lr = -1", "s.toml: optim.lr = '-1': input should be greater"),
        ({}, "[grid]\noptim.lr = [0.1, -1]", "s.toml: optim.lr = '-1': input should be greater"),
        ({}, "[grid]\noptim.lr = []", "s.toml: grid: optim.lr = []: expected a list of one value"),
        ({}, "[grid]\noptim.lr = 0.1", "s.toml: grid: optim.lr = 0.1: expected a list of one"),
        ({}, "[grid]\noptim.lr = [{a = 1}]", "s.toml: grid: optim.lr: expected text, numbers"),
        ({}, "[settings]\noptim.lr = 2000-01-01", "s.toml: settings: optim.lr: expected text"),
        ({}, "[grid]\noptim.lr = [0.1, 1e-1]", "s.toml: lr=0.1,seed=1 and lr=0.1,seed=1: the same"),
        ({}, "[grid]\noptim.lr = [1, 1.0]", "s.toml: lr=1,seed=1 and lr=1.0,seed=1: the same"),
        ({}, "[settings]\noptim.lr = 1\n[grid]\noptim.lr = [1]", "s.toml: grid: optim.lr: in"
         " [settings] as well"),
        ({}, "[settings]\ntrain.seed = 1", "s.toml: settings: train.seed: seeds = […] says that"),
        ({}, "[grid]\ntrain.seed = [1]", "s.toml: grid: train.seed: seeds = […] says that"),
        ({}, "[grid]\neval = 'x'", "s.toml: grid: eval: belongs to the top of the file"),
        ({"eval": "balpoe train"}, "", "s.toml: eval: 'balpoe train': balpoe train reads no runs"),
        ({"eval": "csr eval"}, "", "s.toml: eval: 'csr eval': of csr, but balpoe is trained"),
        ({"eval": "balpoe eval --run x"}, "", "s.toml: eval: --run is not for here"),
        ({"eval": "balpoe eval --json"}, "", "s.toml: eval: --json is not for here"),
        ({"eval": "balpoe eval", "weights": "bst"}, "", "s.toml: weights = 'bst': string should"),
        ({"weights": "best"}, "", "s.toml: weights = 'best': goes with eval"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_file_and_key(
    sweep_file: Write, keys: dict[str, object], tables: str, message: str
) -> None:
    text = complaint(sweep_file(tables, **keys))
    assert text.startswith(message)
    assert "\n" not in text


def test_files_that_are_not_toml_or_bombs_are_refused(isolated: Path) -> None:
    assert "nowhere.toml: cannot be read" in complaint(Path("nowhere.toml"))
    path = isolated / "s.toml"
    path.write_text("a.b.c.d.e.f.g.h.i = 1")
    assert "more than 8 dotted parts" in complaint(path)
    path.write_text("[" * 99)
    assert "nested deeper" in complaint(path)


def test_a_grid_that_explodes_is_refused_before_it_is_built(sweep_file: Write) -> None:
    keys = ("optim.lr", "optim.weight_decay", "optim.clip_norm", "train.epochs", "train.keep",
            "train.patience", "train.log_every", "schedule.t_max", "loss.mixup_alpha")  # fmt: skip
    tables = "[grid]\n" + "\n".join(f"{key} = {list(range(2, 100))}" for key in keys)
    assert f"more than {MAX_CELLS:,}" in complaint(sweep_file(tables))


def test_as_many_cells_as_allowed_are_allowed(
    sweep_file: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep_plan, "MAX_CELLS", 3)
    assert len(read_plan(sweep_file(seeds=[1, 2, 3])).cells) == 3
    message = complaint(sweep_file(seeds=[1, 2, 3, 4]))
    assert message == "s.toml: grid: 4 cells, more than 3"


def test_a_measuring_command_keeps_its_options(sweep_file: Write) -> None:
    plan = read_plan(sweep_file(eval="balpoe eval --no-rejection --cpu", weights="best"))
    assert plan.eval == ["balpoe", "eval", "--no-rejection", "--cpu"]
    assert plan.weights == "best"


@pytest.mark.parametrize(
    "command",
    ["balpoe train", "csr train --stage concept", "taskmoe specialist --specialist 0",
     "taskmoe train --merged none", "diffusion train", "controller grpo"],
)  # fmt: skip
def test_every_system_can_be_swept(sweep_file: Write, command: str) -> None:
    plan = read_plan(sweep_file("[grid]\noptim.lr = [0.001, 0.01]", command=command, seeds=[1]))
    assert [cell.name for cell in plan.cells] == ["lr=0.001,seed=1", "lr=0.01,seed=1"]
    assert plan.command == command
