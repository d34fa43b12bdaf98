"""One factor for every upper bound on wall-clock time."""

from __future__ import annotations

import pytest

from caesura_testing import patience


@pytest.mark.parametrize(
    ("text", "load", "cores", "factor"),
    [
        ("", 0.0, 2, 1.0),
        ("", 2.0, 2, 2.0),
        ("", 3.0, 4, 1.75),
        ("", 500.0, 2, 5.0),
        ("", 1.0, 0, 2.0),
        ("5", 0.0, 2, 5.0),
        ("0.1", 0.0, 2, 1.0),
        ("25", 500.0, 2, 25.0),
    ],
)
def test_what_is_asked_for_counts_else_the_load(text: str, load: float, cores: int, factor: float) -> None:
    assert patience.factor_from(text, load, cores) == factor


def test_what_is_not_a_number_is_an_error() -> None:
    with pytest.raises(ValueError, match="much"):
        patience.factor_from("much", 0.0, 1)


def test_bounds_are_multiplied() -> None:
    assert patience.FACTOR >= 1
    assert patience.patient(3.0) == 3.0 * patience.FACTOR
