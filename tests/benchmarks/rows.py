"""What a benchmark found, as rows of one table."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """One ratio: medians of a plain way and of ours, measured in turn in the same process."""

    what: str
    """The work that both do."""
    against: str
    """The plain way."""
    before_ms: float
    after_ms: float
    aim: str = ""
    """What the ratio should be, as `≥ 2.5`."""

    @property
    def ratio(self) -> float:
        """How many times as long the plain way takes."""
        return self.before_ms / self.after_ms

    def document(self) -> dict[str, Any]:
        """Return it as JSON types."""
        return {**asdict(self), "ratio": self.ratio}


def in_seconds(what: str, against: str, before: float, after: float, aim: str = "") -> Row:
    """Make a row of seconds."""
    return Row(what, against, before * 1000, after * 1000, aim)
