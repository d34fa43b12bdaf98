"""What ``caesura doctor --measure`` found: single pauses, their medians, and the table for people. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Literal, get_args

import msgspec

from caesura_host_updater.drivers.diagnosis import Diagnosis, ok, warning, wrong

MeasuredMethod = Literal["freeze", "swap", "replace"]
METHODS: tuple[MeasuredMethod, ...] = get_args(MeasuredMethod)
CLOCK_BOUND_S = 0.001
"""s: what a guest's clock is off by after it was set, where neither host nor guest is busy."""
_MS = 1000


class PauseSample(msgspec.Struct, frozen=True, kw_only=True):
    """One pause. Seconds.

    Args:
        pause_s: from the request until the guest is confirmed to run, with no update in between.
        clock_before_s: guest minus host after the pause.
        clock_after_s: the same after the clock was set.
        clock_took_s: from the request to set it until it was measured again.
        memory_equal: whether the guest found its pattern unharmed, byte by byte, in the boot that it was in before.
    """

    method: MeasuredMethod
    pause_s: float
    clock_before_s: float
    clock_after_s: float
    clock_took_s: float
    memory_equal: bool


class MethodFigures(msgspec.Struct, frozen=True, kw_only=True):
    """All pauses of one method; seconds. ``ratio``: its median in medians of a freeze of the same measurement."""

    method: MeasuredMethod
    runs: int
    pause_median_s: float
    pause_least_s: float
    pause_most_s: float
    ratio: float
    clock_before_median_s: float
    clock_after_median_s: float
    clock_took_median_s: float


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """Of one measurement.

    Args:
        accelerator: ``kvm`` or ``tcg``, with the reason for people.
        boot_s: from the start of QEMU until the guest agent answered.
        pattern_bytes: how much of the guest's memory was compared after each pause.
        pauses_unharmed: after how many it was equal.
    """

    qemu: str
    accelerator: str
    accelerator_reason: str
    memory_mib: int
    boot_s: float
    pattern_bytes: int
    pauses: int
    pauses_unharmed: int
    methods: tuple[MethodFigures, ...]


def figures_of(samples: Sequence[PauseSample]) -> tuple[MethodFigures, ...]:
    """Medians, in the order of METHODS; only methods that have samples."""
    freezes = [each.pause_s for each in samples if each.method == "freeze"]
    return tuple(
        _of_method(method, mine, median(freezes) if freezes else 0.0)
        for method in METHODS
        if (mine := [each for each in samples if each.method == method])
    )


def _of_method(method: MeasuredMethod, mine: Sequence[PauseSample], freeze_s: float) -> MethodFigures:
    pauses = [each.pause_s for each in mine]
    return MethodFigures(
        method=method,
        runs=len(mine),
        pause_median_s=median(pauses),
        pause_least_s=min(pauses),
        pause_most_s=max(pauses),
        ratio=median(pauses) / freeze_s if freeze_s else 0.0,
        clock_before_median_s=median(abs(each.clock_before_s) for each in mine),
        clock_after_median_s=median(abs(each.clock_after_s) for each in mine),
        clock_took_median_s=median(each.clock_took_s for each in mine),
    )


def findings_of(figures: Figures) -> list[Diagnosis]:
    """What is to be judged: memory and clocks. How long a pause may be is the operator's budget."""
    harmed = figures.pauses - figures.pauses_unharmed
    about = f"{figures.pattern_bytes >> 20} MiB of the guest's memory compared byte by byte after each of {figures.pauses} pauses"
    found = [
        wrong(
            "measure.memory",
            f"{about}: harmed after {harmed}",
            "do not swap or replace with this QEMU; report it, with its version and the output of --json",
        )
        if harmed
        else ok("measure.memory", f"{about}: unharmed")
    ]
    worst = max((each.clock_after_median_s for each in figures.methods), default=0.0)
    clock = f"the guest's clock was {worst * _MS:.2f} ms off after it was set (the largest median)"
    if worst <= CLOCK_BOUND_S:
        found.append(ok("measure.clock", clock))
    else:
        found.append(
            warning(
                "measure.clock",
                f"{clock}; at rest it is below {CLOCK_BOUND_S * _MS:g} ms",
                "measure again while the host is at rest",
            )
        )
    return found


def table_of(figures: Figures) -> list[str]:
    """Lines for people."""
    head = f"{'':9}{'pause, median':>14}{'least':>11}{'most':>11}{'of a freeze':>13}{'clock off by':>14}{'once set':>10}{'in':>9}"
    return [
        f"guest    {figures.memory_mib} MiB, QEMU {figures.qemu}, {figures.accelerator}, up after {figures.boot_s:.1f} s",
        head,
        *(
            f"{each.method:9}{_ms(each.pause_median_s):>14}{_ms(each.pause_least_s):>11}{_ms(each.pause_most_s):>11}"
            f"{f'{each.ratio:.3g} x':>13}{_ms(each.clock_before_median_s):>14}{_ms(each.clock_after_median_s):>10}"
            f"{_ms(each.clock_took_median_s):>9}"
            for each in figures.methods
        ),
    ]


def _ms(seconds: float) -> str:
    value = seconds * _MS
    return f"{value:.0f} ms" if value >= 100 else f"{value:.1f} ms" if value >= 1 else f"{value:.2f} ms"
