"""The tables that every trained system has."""

import pytest

from moectl.engine.sections import OptimSection, ScheduleSection, TrainSection, seconds_of


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("3h50m", 13800), ("45m", 2700), ("90s", 90), ("0.5s", 0.5), ("1h0m30s", 3630), ("", 0)],
)
def test_durations(text: str, seconds: float) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["90", "1d", "h", "1 h", "-5m", "5m1h", "s", "0.5h"])
def test_other_ways_to_write_a_duration_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a duration such as 3h50m"):
        TrainSection(max_time=text)


def test_no_time_limit_is_infinite() -> None:
    assert TrainSection().max_seconds == float("inf")
    assert TrainSection(max_time="2m").max_seconds == 120


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_the_momentum_of_sgd_does_not_disturb_others(name: str) -> None:
    OptimSection(name=name, momentum=0.9, nesterov=True)  # type: ignore[arg-type]
    OptimSection(name=name, nesterov=True)  # type: ignore[arg-type]


def test_nesterov_needs_momentum() -> None:
    with pytest.raises(ValueError, match=r"optim\.nesterov needs optim\.momentum above 0"):
        OptimSection(nesterov=True)


def test_steps_must_be_in_order_only_where_they_matter() -> None:
    with pytest.raises(ValueError, match=r"schedule\.step1 = 5 must not be after schedule\.step2"):
        ScheduleSection(name="multistep", step1=5, step2=4)
    ScheduleSection(name="cosine", step1=5, step2=4)


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        (OptimSection, "lr", 0),
        (OptimSection, "weight_decay", -1e-9),
        (OptimSection, "momentum", 1),
        (OptimSection, "lr", float("nan")),
        (TrainSection, "epochs", 0),
        (TrainSection, "batch_size", 0),
        (TrainSection, "accumulate", 0),
        (TrainSection, "keep", 1),
        (TrainSection, "seed", -1),
        (ScheduleSection, "gamma", 1.1),
        (ScheduleSection, "warmup", -1),
    ],
)
def test_values_out_of_range_are_refused(section: type, name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        section(**{name: value})
