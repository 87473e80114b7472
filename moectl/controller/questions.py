"""What the command line asks: questions, each with its budget, and who chooses the plans."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moectl.engine.errors import UserError
from moectl.engine.files import is_file, read_text


@dataclass(frozen=True)
class Question:
    """What is asked, within which budget."""

    image: Path
    question: str
    budget: float


@dataclass(frozen=True)
class Choice:
    """What chooses the plans.

    Raises:
        UserError: if two things are to.
    """

    by: Literal["controller", "lut", "plan"]
    plan: Path | None = None
    """A file with the plan of all answers."""
    target: float = 0.0
    """Share of budgets that the guard may miss; 0 for no guard."""

    def __post_init__(self) -> None:
        if self.by == "lut" and self.plan is not None:
            raise UserError(
                f"--policy lut and --plan {self.plan}: both choose the plan", "give one of them"
            )


def read_questions(path: Path, budgets: Sequence[float]) -> Iterator[Question]:
    """Read questions from a file of JSON lines: `image`, `question`, and perhaps `budget`.

    Args:
        path: of the file; images are named from its folder on.
        budgets: of the lines that have none.

    Raises:
        UserError: naming the line that is not as it should be.
    """
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            values = json.loads(line)
            image, question = values["image"], values["question"]
        except ValueError:
            raise UserError(f"{place}: no JSON") from None
        except (KeyError, TypeError):
            raise UserError(f"{place}: expected an object with image and question") from None
        if not isinstance(image, str) or not isinstance(question, str) or not question.strip():
            raise UserError(f"{place}: image and question: expected texts")
        if not is_file(path.parent / image):
            raise UserError(f"{place}: {path.parent / image}: no such image")
        own = [values["budget"]] if "budget" in values else budgets
        if not own or not all(_is_budget(budget) for budget in own):
            raise UserError(f"{place}: no budget above 0", "--budget sets one for all")
        yield from (Question(path.parent / image, question, float(budget)) for budget in own)


def _is_budget(value: object) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 < value < math.inf  # type: ignore[operator]


def read_budgets(text: str) -> list[float]:
    """Read budgets with commas between them.

    Raises:
        UserError: if one is none.
    """
    found = []
    for part in filter(None, map(str.strip, text.split(","))):
        try:
            found.append(float(part))
        except ValueError:
            found.append(math.nan)
        if not _is_budget(found[-1]):
            raise UserError(f"--budget {part}: expected a number above 0")
    return found


def questions_of(image: Path | None, prompt: str, budget: str, file: Path | None) -> list[Question]:
    """Return what the command line asks.

    Raises:
        UserError: if it does not say what.
    """
    budgets = read_budgets(budget)
    if file is not None:
        if image is not None or prompt:
            raise UserError("--questions excludes --image and --prompt")
        found = list(read_questions(file, budgets))
        if not found:
            raise UserError(f"{file}: holds no question")
        return found
    if image is None or not prompt.strip() or not budgets:
        raise UserError("expected --image, --prompt and --budget, or --questions FILE")
    return [Question(image, prompt, one) for one in budgets]
