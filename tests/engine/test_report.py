import pytest

from moectl.engine.report import cell, duration, image, percent, table


def test_numbers_stand_right_and_text_left() -> None:
    found = table(("a", "b", "c"), [("x", 1.23456, "45.6"), ("y", None, "–")])
    assert found.splitlines() == [
        "| a | b | c |",
        "| --- | ---: | ---: |",
        "| x | 1.235 | 45.6 |",
        "| y | – | – |",
    ]


def test_a_table_without_rows_has_its_head() -> None:
    assert table(("a", "b"), []) == "| a | b |\n| --- | --- |\n"


def test_a_cell_cannot_break_its_row() -> None:
    assert cell("a|b\nc") == "a\\|b c"
    assert cell(None) == "–"
    assert cell(True) == "True"


@pytest.mark.parametrize(
    ("value", "text"), [(0.12345, "12.3"), (0.0, "0.0"), (1.0, "100.0"), (None, "–")]
)
def test_percent_of_a_fraction(value: float | None, text: str) -> None:
    assert percent(value) == text


def test_percent_with_more_digits() -> None:
    assert percent(0.12345, 2) == "12.35"


def test_an_image_with_a_space_in_its_name_is_still_a_link() -> None:
    assert image("plots/a b.png", "A") == "![A](plots/a%20b.png)\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (59.4, "59.4 s"), (59.97, "1 min 00 s"), (61, "1 min 01 s"),
     (3599.6, "1 h 00 min"), (11100, "3 h 05 min"), (90_000, "25 h 00 min")],
)  # fmt: skip
def test_durations_show_two_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text
