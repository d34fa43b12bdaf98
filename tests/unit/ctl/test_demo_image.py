"""The demo's guest image is built in a process of its own, which ends with the demo, whatever it is at."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence

import pytest

from caesura.runtime.errors import CaesuraError
from caesura.runtime.processes import marked_processes
from caesura_demo.guests import GuestImage
from caesura_demo.image import build_image
from caesura_demo.workspace import CleanUp
from caesura_testing.collector import eventually


def _python(code: str) -> Sequence[str]:
    return (sys.executable, "-c", code)


def _run_id(name: str) -> str:
    return f"image-{name}-{os.getpid()}"


async def test_progress_is_passed_on_and_the_answer_read() -> None:
    said: list[str] = []
    code = (
        "import sys; print('fetching 3 packages ...', file=sys.stderr, flush=True);"
        'print(\'{"kernel": "/k", "initrd": "/i", "more": 1}\')'
    )
    made = await build_image(_run_id("good"), said.append, CleanUp(said.append), _python(code))
    assert made == GuestImage("/k", "/i")
    assert said == ["fetching 3 packages"]


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (
            'import sys; print(\'{"error": "E", "reason": "no apt here"}\', file=sys.stderr); sys.exit(1)',
            "no apt here",
        ),
        ("import sys; sys.exit(3)", "exit code 3"),
        ("print('nonsense')", "its manifest cannot be read"),
    ],
)
async def test_a_build_that_fails_says_why(code: str, words: str) -> None:
    with pytest.raises(CaesuraError, match=words):
        await build_image(_run_id("bad"), lambda _: None, CleanUp(lambda _: None), _python(code))


@pytest.mark.parametrize("hurried", [False, True])
async def test_a_build_that_is_cancelled_ends_with_all_that_it_started(hurried: bool) -> None:
    """Hurried, not even one that ignores SIGTERM is waited for."""
    said: list[str] = []
    ignore = "signal.signal(signal.SIGTERM, signal.SIG_IGN);" if hurried else ""
    code = (
        f"import signal, subprocess, sys, time; {ignore}"
        "subprocess.Popen(['sleep', '1000']); print('up', file=sys.stderr, flush=True); time.sleep(1000)"
    )
    clean_up = CleanUp(said.append)
    run_id = _run_id(f"cancelled-{hurried}")
    building = asyncio.create_task(build_image(run_id, said.append, clean_up, _python(code)))
    await eventually(lambda: said == ["up"])
    building.cancel()
    if hurried:
        clean_up.hurry.set()
    with pytest.raises(asyncio.CancelledError):
        await building
    assert list(marked_processes(f"CAESURA_DEMO_RUN={run_id}")) == []
