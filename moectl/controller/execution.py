"""What came of answering one question by one plan: times, work, answer."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

Objective = Literal["total", "ttft", "prefill", "per_token"]
"""Which time a budget is held against: of the whole answer, to its first token, of the first pass
through the text network, or of each further token."""


@dataclass(frozen=True)
class Timings:
    """Milliseconds of the stages of one answer."""

    vision: float
    """Image tower and projector."""
    prefill: float
    """First pass through the text network."""
    decode: float
    """All later passes."""
    new_tokens: int
    """Tokens of the answer, the end mark included; the first comes from the prefill."""
    controller: float = 0.0
    """Features beyond those that the answer needs anyway, and the choice of a plan."""

    @property
    def per_token(self) -> float:
        """Milliseconds of each token after the first."""
        return self.decode / max(1, self.new_tokens - 1)

    def latency(self, objective: Objective) -> float:
        """Return the milliseconds that a budget is held against."""
        first = self.controller + self.vision + self.prefill
        return {
            "total": first + self.decode,
            "ttft": first,
            "prefill": self.prefill,
            "per_token": self.per_token,
        }[objective]


@dataclass(frozen=True)
class Execution:
    """One answer to one question by one plan."""

    answer: str
    accuracy: float
    """Score of the answer in 0 to 1."""
    timings: Timings
    gflop: float
    """Work of the whole answer, vision included, in 10⁹ floating-point operations."""
    crops: int
    """Tiles of the image, without the view of the whole."""
    vision_tokens: int
    text_tokens: int

    def plain(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def execution_from(values: dict[str, Any]) -> Execution:
    """Read what `Execution.plain` wrote."""
    return Execution(**{**values, "timings": Timings(**values["timings"])})
