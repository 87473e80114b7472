"""Questions as they are typed, and as they stand in a file."""

import json
from pathlib import Path
from typing import Any

import pytest

from moectl.controller.questions import Question, questions_of, read_budgets, read_questions
from moectl.engine.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two files that pass for images: they are not opened here."""
    for name in ("a.png", "b.png"):
        (tmp_path / name).touch()
    return tmp_path


def write(folder: Path, *lines: Any) -> Path:
    path = folder / "asked.jsonl"
    texts = (
        line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines
    )
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return path


def test_images_lie_beside_the_file_and_budgets_are_those_of_lines_or_of_all(folder: Path) -> None:
    lines: list[Any] = [
        {"image": "a.png", "question": "What\u2028colour?", "budget": 60},
        "",
        {"image": str(folder / "b.png"), "question": "How many?"},
    ]
    path = write(folder, *lines)
    assert list(read_questions(path, [20.0, 30.5])) == [
        Question(folder / "a.png", "What\u2028colour?", 60.0),
        Question(folder / "b.png", "How many?", 20.0),
        Question(folder / "b.png", "How many?", 30.5),
    ]


GOOD = {"image": "a.png", "question": "What?", "budget": 5}


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "no JSON"),
        ("[1]", "expected an object with image and question"),
        ('"text"', "expected an object with image and question"),
        ({"image": "a.png", "budget": 5}, "expected an object with image and question"),
        ({**GOOD, "image": 3}, "image and question: expected texts"),
        ({**GOOD, "question": ["What?"]}, "image and question: expected texts"),
        ({**GOOD, "question": " "}, "image and question: expected texts"),
        ({**GOOD, "image": "c.png"}, "c.png: no such image"),
        ({**GOOD, "budget": 0}, "no budget above 0"),
        ({**GOOD, "budget": "5"}, "no budget above 0"),
        ({**GOOD, "budget": True}, "no budget above 0"),
        ({**GOOD, "budget": None}, "no budget above 0"),
        (json.dumps({**GOOD, "budget": float("inf")}), "no budget above 0"),
        (json.dumps({**GOOD, "budget": float("nan")}), "no budget above 0"),
        ({"image": "a.png", "question": "What?"}, "no budget above 0"),
    ],
)
def test_a_line_that_is_wrong_is_named(folder: Path, line: Any, told: str) -> None:
    path = write(folder, GOOD, "", line)
    with pytest.raises(UserError) as caught:
        list(read_questions(path, []))
    assert f"{path}, line 3: " in caught.value.message
    assert told in caught.value.message


def test_a_file_that_cannot_be_read_is_named(folder: Path) -> None:
    with pytest.raises(UserError, match=r"none\.jsonl: cannot be read \(No such file"):
        questions_of(None, "", "", folder / "none.jsonl")
    strange = folder / "strange.jsonl"
    strange.write_bytes(b'{"image": "\xff"}')
    with pytest.raises(UserError, match=r"strange\.jsonl: not UTF-8 text \(byte 11\)"):
        questions_of(None, "", "", strange)
    with pytest.raises(UserError, match="holds no question"):
        questions_of(None, "", "", write(folder, "", " "))


def test_budgets_stand_between_commas() -> None:
    assert read_budgets(" 20, 3.5,1e2 ") == [20.0, 3.5, 100.0]
    assert read_budgets("") == []
    for wrong in ("much", "0", "-3", "inf", "nan"):
        with pytest.raises(UserError, match=f"^--budget {wrong}: expected a number above 0"):
            read_budgets(f"5,{wrong}")


def test_one_question_is_asked_under_each_budget() -> None:
    image = Path("x.png")
    assert questions_of(image, "What?", "5,7", None) == [
        Question(image, "What?", 5.0),
        Question(image, "What?", 7.0),
    ]


@pytest.mark.parametrize(
    ("image", "prompt", "budget"),
    [(None, "What?", "5"), (Path("x.png"), "", "5"), (Path("x"), " ", "5"), (Path("x"), "A", "")],
)
def test_what_is_missing_is_asked_for(image: Path | None, prompt: str, budget: str) -> None:
    with pytest.raises(UserError, match="expected --image, --prompt and --budget, or --questions"):
        questions_of(image, prompt, budget, None)


def test_a_file_excludes_a_single_question(folder: Path) -> None:
    path = write(folder, GOOD)
    assert questions_of(None, "", "9", path) == [Question(folder / "a.png", "What?", 5.0)]
    for image, prompt in ((folder / "a.png", ""), (None, "What?")):
        with pytest.raises(UserError, match="--questions excludes --image and --prompt"):
            questions_of(image, prompt, "9", path)
