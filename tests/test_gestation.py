"""Ages against published tables, and their ranges."""

from __future__ import annotations

import pytest

from famseg.gestation import hadlock, intergrowth

# INTERGROWTH-21st, medians of size: weeks, head circumference in mm.
MEDIANS = ((14, 97.9), (20, 174.7), (26, 245.0), (30, 282.0), (36, 323.0))


@pytest.mark.parametrize(("weeks", "mm"), MEDIANS)
def test_the_median_head_is_as_old_as_it_is(weeks: float, mm: float) -> None:
    by_head = intergrowth(mm)
    assert by_head == pytest.approx(weeks, abs=1.0)
    age = hadlock("head_circumference", mm)
    assert age is not None
    assert age.weeks == pytest.approx(weeks, abs=1.0)


@pytest.mark.parametrize(
    ("measure", "mm", "weeks", "two_sd"),
    [
        ("head_circumference", 177.0, 20.18, 1.48),  # by hand: 8.96 + 9.558 + 1.664
        ("head_circumference", 346.0, 40.07, 2.70),
        ("femur_length", 33.0, 20.32, 1.80),  # 10.35 + 8.118 + 1.851
        ("femur_length", 72.0, 36.87, 3.12),
        ("femur_length", 15.0, 14.42, 1.38),
    ],
)
def test_hadlock_by_hand(measure: str, mm: float, weeks: float, two_sd: float) -> None:
    age = hadlock(measure, mm)
    assert age is not None
    assert age.weeks == pytest.approx(weeks, abs=0.01)
    assert age.two_sd == two_sd


def test_a_femur_in_proportion_changes_little_and_a_short_one_makes_younger() -> None:
    alone, both, short = intergrowth(174.7), intergrowth(174.7, 32.6), intergrowth(174.7, 27.0)
    assert alone is not None and both is not None and short is not None
    assert both == pytest.approx(alone, abs=0.5)
    assert short < both - 0.5


@pytest.mark.parametrize(
    ("measure", "mm"), [("head_circumference", 60.0), ("head_circumference", 370.0), ("head_circumference", 150_000.0)]
)
def test_outside_of_the_formula_there_is_no_age(measure: str, mm: float) -> None:
    assert hadlock(measure, 50.0) is None
    assert hadlock(measure, 400.0) is None
    assert intergrowth(mm) is None
    with pytest.raises(ValueError, match="measure: expected head_circumference or femur_length, got 'abdomen'"):
        hadlock("abdomen", mm)
