"""The benchmarks run, and find guests unharmed; whether their targets are met is for a quiet machine to say."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from caesura_testing.guests import qemu_installed

_BENCHMARKS = Path(__file__).parents[3] / "benchmarks"

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(
        not qemu_installed(),
        reason="QEMU is not installed (on Debian: apt-get install qemu-system-x86 qemu-utils)",
    ),
]


async def run(*words: str) -> str:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(_BENCHMARKS / words[0]),
        *words[1:],
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    out, _ = await process.communicate()
    said = out.decode()
    assert process.returncode in (0, 1), said  # 1: a target was missed, on a busy machine
    return said


async def test_every_way_to_pause_a_guest_leaves_it_whole(tmp_path: Path) -> None:
    said = await run("pause.py", "--ram", "128", "--rounds", "1", "--out", str(tmp_path / "out.json"))
    assert "met      memory and CLOCK_MONOTONIC verified after each of 7 hops" in said, said
    for way in (
        "stop + cont",
        "swap",
        "swap, not compared",
        "replace",
        "pre-copy, default",
        "save + restore",
    ):
        assert f"| 128 MiB | {way} | 1 |" in said


async def test_a_guest_under_load_survives_swaps() -> None:
    said = await run("soak.py", "--swaps", "6", "--every", "3")
    assert "6/6 swaps" in said, said
    assert "No errors were found on the image." in said
    assert "faults: none" in said
    assert "QEMU processes left beside the guest's: none" in said


async def test_a_freeze_of_several_guests_is_measured() -> None:
    said = await run("freeze.py", "--vms", "2", "--times", "2", "--seconds", "0.2")
    assert "2 freezes of 2 guests: overhead median" in said, said
