"""Gestational age from lengths, by published formulas.

For an estimate of age, not for a diagnosis: every formula was fitted to healthy pregnancies.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass

_HADLOCK_WEEKS = (12.0, 42.0)
_HADLOCK_AGES = (18.0, 24.0, 30.0, 36.0)  # weeks, where the next interval begins
# Two standard deviations, weeks, at 12 to 18, 18 to 24, 24 to 30, 30 to 36, 36 to 42 weeks.
_HADLOCK_TWO_SD = {
    "head_circumference": (1.19, 1.48, 2.06, 2.98, 2.70),
    "femur_length": (1.38, 1.80, 2.08, 2.96, 3.12),
}
_INTERGROWTH_WEEKS = (14.0, 40.0)
_LARGEST_HEAD = 500.0  # mm; no fetus has one, and the formula overflows at those of a wrong pixel size


@dataclass(frozen=True)
class Age:
    """Weeks since the last menstrual period."""

    weeks: float
    two_sd: float  # weeks: 95 % of ages lie within weeks ± two_sd


def hadlock(measure: str, mm: float) -> Age | None:
    """Hadlock, Deter, Harrist and Park, "Estimating fetal age: computer-assisted analysis of multiple fetal growth
    parameters", Radiology 152 (1984), 497–501: 361 fetuses of 14 to 42 weeks.

    Head circumference: 8.96 + 0.540 HC + 0.0003 HC³; femur length: 10.35 + 2.460 FL + 0.170 FL² (weeks; cm).

    Args:
        measure: "head_circumference" or "femur_length".
        mm: its length.

    Returns:
        None where the age is outside of 12 to 42 weeks, for which no interval is published.
    """
    cm = mm / 10
    if measure == "head_circumference":
        weeks = 8.96 + 0.540 * cm + 0.0003 * cm**3
    elif measure == "femur_length":
        weeks = 10.35 + 2.460 * cm + 0.170 * cm**2
    else:
        raise ValueError(f"measure: expected head_circumference or femur_length, got {measure!r}")
    if not _HADLOCK_WEEKS[0] <= weeks <= _HADLOCK_WEEKS[1]:
        return None
    return Age(weeks, _HADLOCK_TWO_SD[measure][bisect.bisect(_HADLOCK_AGES, weeks)])


def intergrowth(head_circumference: float, femur_length: float | None = None) -> float | None:
    """Weeks by INTERGROWTH-21st: Papageorghiou et al., "Ultrasound-based gestational-age estimation in late pregnancy",
    Ultrasound Obstet. Gynecol. 48 (2016), 719–726; 14 to 40 weeks.

    Days: exp(0.03243 ln²HC + 0.001644 FL ln HC + 3.813); without FL, exp(0.05970 ln²HC + 6.409·10⁻⁹ HC³ + 3.3258). Half
    of the 95 % interval is 6 to 7 days at 14 weeks, 12 to 14 days at 26 weeks, and more later.

    Args:
        head_circumference: mm.
        femur_length: mm.

    Returns:
        None where the age is outside of 14 to 40 weeks.
    """
    if not head_circumference <= _LARGEST_HEAD:
        return None
    log = math.log(head_circumference)
    if femur_length is None:
        days = math.exp(0.05970 * log**2 + 6.409e-9 * head_circumference**3 + 3.3258)
    else:
        days = math.exp(0.03243 * log**2 + 0.001644 * femur_length * log + 3.813)
    weeks = days / 7
    return weeks if _INTERGROWTH_WEEKS[0] <= weeks <= _INTERGROWTH_WEEKS[1] else None
