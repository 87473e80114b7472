"""What is remembered of answers, and how questions are dealt out."""

from dataclasses import replace

import torch

from moectl.controller.environment import Features, Remembered, Rows
from moectl.controller.execution import Execution
from moectl.controller.plans import Plan
from moectl.controller.simulator import Simulator
from moectl.engine.sources import Chunk


class Counted(Simulator):
    """Notes what it is asked."""

    def __init__(self, count: int) -> None:
        super().__init__(count, 0, "train")
        self.looked = 0
        self.calls: list[tuple[int, str]] = []

    def features(self) -> Features:
        self.looked += 1
        return super().features()

    def execute(self, row: int, plan: Plan) -> Execution:
        self.calls.append((row, plan.key()))
        return super().execute(row, plan)


def test_no_question_is_answered_twice_by_the_same_plan() -> None:
    inner = Counted(4)
    environment = Remembered(inner)
    full = environment.space.full
    low = replace(full, tier="low")
    asked = [(0, full), (1, full), (0, full), (0, low), (0, low), (1, full)]
    answers = [environment.execute(*pair) for pair in asked]
    assert inner.calls == [(0, full.key()), (1, full.key()), (0, low.key())]
    assert answers == [Simulator(4, 0, "train").execute(*pair) for pair in asked]
    assert (environment.asked, environment.answered) == (6, 3)


def test_plans_that_compute_the_same_share_an_answer() -> None:
    inner = Counted(1)
    environment = Remembered(inner)
    active = (*[True] * 15, False)
    plans = [Plan("low", active, (*[8] * 15, last)) for last in (8, 4)]
    first, second = (environment.execute(0, plan) for plan in plans)
    assert first is second
    assert len(inner.calls) == 1


def test_answers_of_before_are_taken_by_the_name_of_the_question() -> None:
    inner = Counted(3)
    full = inner.space.full
    before = replace(inner.execute(0, full), answer="from before")
    known = {("sim/train/2", full.key()): before}
    environment = Remembered(inner, known)
    inner.calls.clear()
    assert environment.execute(2, full) is before
    assert environment.execute(1, full).answer == ""
    assert inner.calls == [(1, full.key())]
    assert len(known) == 1, "what was handed in stays as it is"


def test_features_are_computed_once() -> None:
    inner = Counted(5)
    environment = Remembered(inner)
    assert inner.looked == 0
    assert environment.features() is environment.features()
    assert inner.looked == 1
    assert environment.ids == inner.ids
    assert environment.space == inner.space


def test_batches_are_the_questions_of_the_chunks() -> None:
    rows = [torch.tensor([3, 1]), torch.tensor([0])]
    chunks = [Chunk(0, place, part, part, 2, True) for place, part in enumerate(rows)]
    found = list(Rows(4).batches(iter(chunks), 0, torch.device("cpu")))
    assert [batch.tolist() for batch in found] == [[3, 1], [0]]
    assert len(Rows(4)) == 4


def test_processes_share_the_questions_in_their_order() -> None:
    parts = [list(Rows(7).ordered(2, torch.device("cpu"), rank, 2)) for rank in (0, 1)]
    assert [[rows.tolist() for rows, _ in part] for part in parts] == [
        [[0, 2], [4, 6]],
        [[1, 3], [5]],
    ]
    assert all(torch.equal(*pair) for part in parts for pair in part)
