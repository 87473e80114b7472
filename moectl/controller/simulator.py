"""Questions, answers and latencies by formula: a whole training in seconds.

Some questions need fine detail of the image, some much of the network; both needs show in the
features. Letters: N questions, D width of a feature, L blocks.
"""

import hashlib
import math

import torch

from moectl.controller.environment import Features
from moectl.controller.execution import Execution, Timings
from moectl.controller.importance import MOLMOE
from moectl.controller.plans import Plan, Space, Tier, top_k_choices
from moectl.engine.seeding import key

BLOCKS, TOP_K = 16, 8
_TIERS = (Tier("low", 1, 3, 3), Tier("medium", 4, 8, 6), Tier("high", 9, 12, 12))
_SHOWN = {"low": 0.30, "medium": 0.62, "high": 1.0}  # detail that a tier shows
_WIDTH = 32  # of both features
_NOISE = 0.02  # of the latency
_TEXT = 24


def space() -> Space:
    """The plans of the simulated network: those of MolmoE-1B."""
    return Space(
        blocks=BLOCKS,
        mixtures=(True,) * BLOCKS,
        default_top_k=TOP_K,
        top_k_choices=top_k_choices(TOP_K),
        always_on=(0,),
        min_active=math.ceil(0.75 * BLOCKS),
        max_active=BLOCKS,
        tiers=_TIERS,
    )


class Simulator:
    """A stand-in for a network and its questions; the same ones for the same seed.

    Accuracy is the chance of a right answer: what the tier shows of the detail that is needed,
    times what is left without the skipped blocks, times what is left with fewer experts.

    Args:
        count: N.
        seed: of the questions.
        split: train, val or test, which differ.
    """

    def __init__(self, count: int, seed: int, split: str) -> None:
        self.space = space()
        self.ids = [f"sim/{split}/{row}" for row in range(count)]
        draws = torch.Generator().manual_seed(key(seed, "simulator", split))
        self.detail = torch.rand(count, generator=draws)
        """(N,) share of the image's detail that a question needs."""
        self.depth = torch.rand(count, generator=draws)
        """(N,) how much an answer suffers from fewer experts and blocks."""
        self._blur = 0.1 * torch.randn(count, 2 * _WIDTH, generator=draws)
        # The way in which needs show is the same for all splits.
        maps = torch.Generator().manual_seed(key(seed, "simulator", "features"))
        self._shows = torch.randn(2, 6, _WIDTH, generator=maps)

    def features(self) -> Features:
        """Return features from which the needs can be read."""
        angles = torch.arange(1, 4) * math.pi / 2
        found = []
        for need, shows in zip((self.detail, self.depth), self._shows, strict=True):
            waves = need[:, None] * angles
            found.append(torch.cat([waves.sin(), waves.cos()], 1) @ shows / math.sqrt(6))
        blurred = torch.cat(found, 1) + self._blur
        return Features(blurred[:, :_WIDTH], blurred[:, _WIDTH:])

    def execute(self, row: int, plan: Plan) -> Execution:
        """Answer question number `row` by a plan."""
        timings, gflop = self._times(row, plan)
        crops = next(tier.nominal for tier in _TIERS if tier.name == plan.tier)
        chance = self.accuracy(row, plan)
        return Execution("", chance, timings, gflop, crops, 144 * (crops + 1), _TEXT)

    def accuracy(self, row: int, plan: Plan) -> float:
        """Return the chance of a right answer."""
        detail, depth = float(self.detail[row]), float(self.depth[row])
        missing = max(0.0, detail - _SHOWN[plan.tier])
        seen = math.exp(-((missing / 0.25) ** 2))
        skipped = (1 - MOLMOE[block] for block in range(BLOCKS) if not plan.active[block])
        # Of those of all blocks: skipping a block never helps, however few experts it has.
        experts = sum(plan.top_k[block] for block in plan.blocks) / BLOCKS / TOP_K
        return 0.9 * seen * math.prod(skipped) * (1 - 0.6 * depth * (1 - experts))

    def _times(self, row: int, plan: Plan) -> tuple[Timings, float]:
        crops = next(tier.nominal for tier in _TIERS if tier.name == plan.tier)
        tokens = 144 * (crops + 1) + _TEXT
        experts = sum(plan.top_k[block] for block in plan.blocks)
        per_block = 0.25 + 2.7e-3 * tokens
        prefill = 5.0 + len(plan.blocks) * per_block + 5.4e-4 * tokens * experts
        decode = 4.0 + 0.9 * len(plan.blocks) + 0.11 * experts
        noise = 1 + _NOISE * _gauss(f"{self.ids[row]} {plan.key()}")
        vision = 6.0 + 5.0 * (crops + 1)
        times = Timings(vision * noise, prefill * noise, decode * noise, 4)
        return times, 0.1 * tokens * (len(plan.blocks) + experts) / BLOCKS


def _gauss(text: str) -> float:
    """Return a normal number that a text decides."""
    digest = hashlib.sha256(text.encode()).digest()
    first, second = (int.from_bytes(digest[part : part + 8], "big") for part in (0, 8))
    radius = math.sqrt(-2 * math.log((first + 1) / 2**64))
    return radius * math.cos(2 * math.pi * second / 2**64)
