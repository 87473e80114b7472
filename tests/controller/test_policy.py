"""Drawing plans and their probabilities, against sums over all plans and draws one by one.

Letters: B samples, O optional blocks.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from itertools import permutations, product

import pytest
import torch
from torch import Tensor

from moectl.controller.model import Scores
from moectl.controller.plans import Plan, Space, Tier
from moectl.controller.policy import (
    Choice,
    chosen_parts,
    decide,
    draw,
    entropies,
    log_prob,
    order_log_prob,
    plans,
    ranked,
)

SMALL = Space(
    blocks=4,
    mixtures=(True, True, True, True),
    default_top_k=3,
    top_k_choices=(2, 3),
    always_on=(0,),
    min_active=2,
    max_active=4,
    tiers=(Tier("low", 1, 3, 3), Tier("high", 9, 12, 12)),
)
MIXED = replace(SMALL, mixtures=(True, True, False, True), always_on=(0, 3), min_active=2)
PLAIN = replace(SMALL, mixtures=(True, True, False, False))  # perhaps without a choice
DENSE = replace(SMALL, mixtures=(False,) * 4, default_top_k=0, top_k_choices=())
SPACES = {
    "all have experts": (SMALL, False),
    "some have": (MIXED, False),
    "none has": (DENSE, False),
    "all share a number": (SMALL, True),
    "some share a number": (MIXED, True),
    "one may have a number to share": (PLAIN, True),
}
MANY = 20000


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scores(space: Space, batch: int = 1, seed: int = 0, *, shared: bool = False) -> Scores:
    """Logits in double precision that prefer some choices clearly."""
    choices = max(1, len(space.top_k_choices))
    shapes = {
        "tier": (batch, len(space.tiers)),
        "count": (batch, len(space.counts)),
        "blocks": (batch, len(space.optional)),
        "top_k": (batch, 1 if shared else space.blocks, choices),
    }
    source = generator(seed)
    return Scores(**{k: torch.randn(v, generator=source).double() for k, v in shapes.items()})


def repeated(of: Scores, times: int) -> Scores:
    return Scores(*(logits.expand(times, *logits.shape[1:]) for logits in of))


def probability(logits: Tensor, place: int) -> float:
    weights = [math.exp(logit) for logit in logits.tolist()]
    return weights[place] / sum(weights)


def order_probability(logits: list[float], drawn: tuple[int, ...]) -> float:
    """Draw one block after the other, each in proportion to its weight among those left."""
    left, total = set(range(len(logits))), 1.0
    for block in drawn:
        total *= math.exp(logits[block]) / sum(math.exp(logits[other]) for other in left)
        left.remove(block)
    return total


def every_probability(of: Scores, space: Space) -> dict[str, float]:
    """The probability of each plan by its key: parts multiplied, orders of the blocks summed."""
    found: dict[str, float] = defaultdict(float)
    logits = of.blocks[0].tolist()
    for tier, count in product(range(len(space.tiers)), range(len(space.counts))):
        wanted = space.counts[count] - len(space.always_on)
        part = probability(of.tier[0], tier) * probability(of.count[0], count)
        for drawn in permutations(range(len(logits)), wanted):
            runs = {*space.always_on, *(space.optional[place] for place in drawn)}
            free = [block for block in runs if space.free[block]]
            # Blocks that have their number together, and the row of that.
            sets = [(free, 0)] * bool(free) if of.shared else [([block], block) for block in free]
            for chosen in product(range(len(space.top_k_choices)), repeat=len(sets)):
                top_k = list(space.uniform(space.default_top_k))
                total = part * order_probability(logits, drawn)
                for (blocks, row), place in zip(sets, chosen, strict=True):
                    total *= probability(of.top_k[0, row], place)
                    for block in blocks:
                        top_k[block] = space.top_k_choices[place]
                active = tuple(block in runs for block in range(space.blocks))
                found[Plan(space.tiers[tier].name, active, tuple(top_k)).key()] += total
    return found


def every_choice(space: Space, *, shared: bool) -> Iterator[Choice]:
    """Each way to come to a plan once; where all blocks run, their order is no choice."""
    optional, sizes = len(space.optional), max(1, len(space.top_k_choices))
    for tier, count in product(range(len(space.tiers)), range(len(space.counts))):
        wanted = space.counts[count] - len(space.always_on)
        orders = {order[:wanted]: order for order in permutations(range(optional))}
        if wanted == optional:
            orders = {(): tuple(range(optional))}
        for order in orders.values():
            runs = {*space.always_on, *(space.optional[place] for place in order[:wanted])}
            free = [space.free[block] and block in runs for block in range(space.blocks)]
            free = [any(free)] if shared else free
            for top_k in product(*(range(sizes if chosen else 1) for chosen in free)):
                values = ([tier], [count], [list(order)], [list(top_k)])
                yield Choice(*(torch.tensor(value) for value in values))


def joined(choices: list[Choice]) -> Choice:
    return Choice(*(torch.cat(parts) for parts in zip(*choices, strict=True)))


def log_probs(of: Scores, choice: Choice, space: Space, *, learned: bool = True) -> Tensor:
    fixed = () if learned else space.optional
    parts = chosen_parts(plans(choice, space, fixed), space, shared=of.shared)
    return log_prob(of, choice, *parts, learned=learned)


def surprise(seen: Counter[str], expected: dict[str, float]) -> float:
    """Chi-square of counts, as deviations of a normal number.

    Source: Wilson and Hilferty 1931.
    """
    total, free = sum(seen.values()), len(expected) - 1
    square = sum((seen[k] - total * p) ** 2 / (total * p) for k, p in expected.items())
    spread = 2 / (9 * free)
    return ((square / free) ** (1 / 3) - 1 + spread) / math.sqrt(spread)


@pytest.mark.parametrize(("space", "shared"), SPACES.values(), ids=SPACES)
def test_probabilities_of_all_plans_are_those_of_drawing_one_by_one(
    space: Space, shared: bool
) -> None:
    of = scores(space, shared=shared)
    choices = joined([*every_choice(space, shared=shared)])
    found: dict[str, float] = defaultdict(float)
    probabilities = log_probs(repeated(of, len(choices.tier)), choices, space).exp()
    for plan, value in zip(plans(choices, space), probabilities.tolist(), strict=True):
        found[plan.key()] += value
    assert sum(found.values()) == pytest.approx(1, abs=1e-12)
    assert shared or len(found) == space.size
    assert found == pytest.approx(every_probability(of, space))


def test_orders_of_some_blocks_sum_to_1() -> None:
    logits = torch.tensor([[0.3, -1.2, 2.0, 0.5, -0.4]], dtype=torch.float64)
    for chosen in range(5):
        orders = {order[:chosen]: order for order in permutations(range(5))}
        order = torch.tensor([*orders.values()])
        found = order_log_prob(
            logits.expand(len(order), 5), order, torch.full((len(order),), chosen)
        )
        assert found.exp().sum().item() == pytest.approx(1, abs=1e-12)
        slow = [order_probability(logits[0].tolist(), drawn) for drawn in orders]
        torch.testing.assert_close(found.exp(), torch.tensor(slow, dtype=torch.float64))


def test_choosing_all_blocks_costs_exactly_nothing_and_has_no_gradient() -> None:
    logits = torch.randn(3, 6, generator=generator()).requires_grad_()
    order = torch.stack([torch.randperm(6, generator=generator(row)) for row in range(3)])
    found = order_log_prob(logits, order, torch.tensor([6, 6, 5]))
    assert found[:2].tolist() == [0, 0]
    assert found[2] < 0
    (slope,) = torch.autograd.grad(found[:2].sum(), logits)
    assert not slope.any()


def test_orders_of_extreme_logits_stay_finite() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0]])
    order = torch.tensor([[0, 2, 1]])
    assert order_log_prob(logits, order, torch.tensor([2])).item() == 0
    assert order_log_prob(logits, order.flip(1), torch.tensor([1])).item() == pytest.approx(-2e4)


@pytest.mark.parametrize(("space", "shared"), [(SMALL, False), (MIXED, False), (PLAIN, True)])
def test_draws_are_as_frequent_as_their_probabilities_say(space: Space, shared: bool) -> None:
    of = scores(space, seed=1, shared=shared)
    drawn = plans(draw(repeated(of, MANY), generator()), space)
    for plan in drawn:
        plan.check(space)
    expected = every_probability(of, space)
    seen = Counter(plan.key() for plan in drawn)
    assert set(seen) <= set(expected)
    assert abs(surprise(seen, expected)) < 3
    # Other logits would be noticed.
    assert surprise(seen, every_probability(scores(space, seed=2, shared=shared), space)) > 10


def test_each_part_is_as_frequent_as_its_probabilities_say() -> None:
    of = scores(SMALL, seed=3)
    choice = draw(repeated(of, MANY), generator(1))
    heads = {"tier": (of.tier, choice.tier), "count": (of.count, choice.active)}
    heads |= {f"top_k {b}": (of.top_k[:, b], choice.top_k[:, b]) for b in range(4)}
    for name, (logits, drawn) in heads.items():
        expected = {str(i): probability(logits[0], i) for i in range(logits.shape[1])}
        assert abs(surprise(Counter(map(str, drawn.tolist())), expected)) < 3, name
    blocks = of.blocks[0].tolist()
    expected = {str([*order]): order_probability(blocks, order) for order in permutations(range(3))}
    assert abs(surprise(Counter(map(str, choice.order.tolist())), expected)) < 3


def test_draws_come_from_their_generator_alone() -> None:
    of = scores(SMALL, 50)
    before = torch.get_rng_state()
    first, again, other = (draw(of, generator(seed)) for seed in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))
    assert not any(torch.equal(*pair) for pair in zip(first, other, strict=True))


def test_every_head_has_a_gradient_and_skipped_blocks_have_none() -> None:
    of = Scores(*(logits.requires_grad_() for logits in scores(SMALL, 40)))
    choice = draw(of, generator())
    drawn = plans(choice, SMALL)
    slopes = torch.autograd.grad(log_probs(of, choice, SMALL).sum(), of)
    tier, count, blocks, top_k = ((slope.abs().sum(-1) > 0).tolist() for slope in slopes)
    assert all(tier)
    assert all(count)
    assert blocks == [not all(plan.active) for plan in drawn]
    assert top_k == [[runs and b > 0 for b, runs in enumerate(plan.active)] for plan in drawn]
    assert any(blocks)


def test_blocks_that_others_choose_cost_nothing() -> None:
    of = Scores(*(logits.requires_grad_() for logits in scores(SMALL, 8)))
    choice = draw(of, generator())
    found = log_probs(of, choice, SMALL, learned=False)
    parts = chosen_parts(plans(choice, SMALL, SMALL.optional), SMALL)
    order = order_log_prob(of.blocks, choice.order, parts[0])
    torch.testing.assert_close(found, log_prob(of, choice, *parts) - order)
    # A zero, not nothing: processes that average gradients wait for every weight.
    (slope,) = torch.autograd.grad(found.sum(), of.blocks)
    assert not slope.any()


def test_the_decision_is_the_most_probable_of_each_part() -> None:
    of = Scores(
        tier=torch.tensor([[0.1, 0.2], [3.0, -1.0]]),
        count=torch.tensor([[0.0, 0.5, 0.2], [-1.0, -2.0, -0.5]]),
        blocks=torch.tensor([[1.0, 3.0, 2.0], [-1.0, -3.0, -2.0]]),
        top_k=torch.tensor([[[0.0, 1.0]] * 4, [[1.0, 0.0]] * 4]),
    )
    assert plans(decide(of), SMALL) == [
        Plan("high", (True, False, True, True), (3, 3, 3, 3)),
        Plan("low", (True, True, True, True), (3, 2, 2, 2)),
    ]
    assert decide(of).order.tolist() == [[1, 2, 0], [0, 2, 1]]


def test_deciding_uses_no_random_number() -> None:
    of = scores(SMALL, 20)
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        found.append(decide(of))
        assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("wide", [3, 200])
def test_of_equals_the_first_comes_first(wide: int) -> None:
    zeros = Scores(*(torch.zeros(shape) for shape in ((2, 3), (2, 5), (2, wide), (2, 4, 5))))
    choice = decide(zeros)
    assert not any(part.any() for part in (choice.tier, choice.active, choice.top_k))
    assert choice.order.tolist() == [[*range(wide)]] * 2
    assert ranked(torch.tensor([[0.0, 2.0, 0.0, 2.0]])).tolist() == [[1, 3, 0, 2]]


def test_indices_point_into_the_space() -> None:
    values = ([1, 0], [0, 1], [[1, 0], [0, 1]], [[1, 0, 1, 0], [1, 1, 1, 1]])
    choice = Choice(*(torch.tensor(value) for value in values))
    found = plans(choice, MIXED)
    assert found == [
        Plan("high", (True, False, False, True), (3, 2, 0, 2)),
        Plan("low", (True, True, False, True), (3, 3, 0, 3)),
    ]
    chosen, free = chosen_parts(found, MIXED)
    assert chosen.tolist() == [0, 1]
    assert free.tolist() == [[False, False, False, True], [False, True, False, True]]


def test_a_fixed_order_of_blocks_is_cut_off_after_the_count() -> None:
    choice = draw(scores(SMALL, 60), generator())
    found = plans(choice, SMALL, (3, 1, 2))
    wanted = {2: (0, 3), 3: (0, 1, 3), 4: (0, 1, 2, 3)}
    assert {len(plan.blocks): plan.blocks for plan in found} == wanted
    counts = [SMALL.counts[place] for place in choice.active.tolist()]
    assert [len(plan.blocks) for plan in found] == counts


def test_entropies_are_1_of_uniform_and_0_of_certain_choices() -> None:
    of = scores(SMALL, 3)
    uniform = entropies(Scores(*(torch.zeros_like(logits) for logits in of)), SMALL)
    assert uniform.keys() == {"tier", "count", "blocks", "top_k"}
    assert [value.item() for value in uniform.values()] == pytest.approx([1] * 4)
    certain = Scores(*(logits == logits.amax(-1, keepdim=True) for logits in of))
    sure = entropies(Scores(*(1e4 * logits.double() for logits in certain)), SMALL)
    assert [value.item() for value in sure.values()] == pytest.approx([0] * 4)


def test_entropies_are_those_of_the_rows_with_a_choice() -> None:
    of = scores(MIXED, 3)
    found = entropies(of, MIXED)

    def slow(rows: list[list[float]]) -> float:
        shares = []
        for row in rows:
            parts = [math.exp(value) / sum(map(math.exp, row)) for value in row]
            shares.append(-sum(part * math.log(part) for part in parts) / math.log(len(row)))
        return sum(shares) / len(shares)

    heads = of._asdict() | {"top_k": of.top_k[:, [1, 3]].flatten(0, 1)}
    expected = {name: slow(logits.tolist()) for name, logits in heads.items()}
    assert {name: value.item() for name, value in found.items()} == pytest.approx(expected)


def test_heads_without_a_choice_have_no_entropy() -> None:
    one = replace(DENSE, tiers=DENSE.tiers[:1], min_active=4)
    assert entropies(scores(one), one).keys() == {"blocks"}
    assert entropies(scores(DENSE), DENSE).keys() == {"tier", "count", "blocks"}
    assert entropies(scores(SMALL), SMALL, learned=False).keys() == {"tier", "count", "top_k"}
    first = replace(SMALL, mixtures=(True, False, False, False))
    for shared in (False, True):
        assert "top_k" not in entropies(scores(first, shared=shared), first)


def test_a_shared_number_has_one_entropy() -> None:
    of = scores(MIXED, 3, shared=True)
    alone = entropies(of._replace(tier=of.top_k[:, 0]), MIXED)
    assert alone["top_k"].item() == pytest.approx(alone["tier"].item())
