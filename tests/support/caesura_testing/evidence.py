"""What a failed test leaves behind for the person who looks for the cause."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path

from caesura_testing.patience import FACTOR, VARIABLE

_LINES = 12
_FILES = 30


def ends_of_logs(folder: Path, lines: int = _LINES) -> str:
    """The last lines of every ``*.log`` below a folder, each under its name; of very many only the first."""
    parts = []
    for path in sorted(folder.rglob("*.log"))[:_FILES]:
        if path.is_file():
            tail = path.read_text(errors="replace").splitlines()[-lines:]
            parts.append("\n".join([f"--- {path.relative_to(folder)}", *tail]))
    return "\n".join(parts)


def repeat_command(nodeid: str, module: object = None, environ: Mapping[str, str] = os.environ) -> str:
    """The command that repeats a test alone, as patient and with the same seed.

    Args:
        nodeid: pytest's name of it.
        module: its module; ``REPEAT_WITH`` in it maps variables to what repeats its run, such as the seed that was drawn.
        environ: with ``CI=true`` Hypothesis draws the same examples each time, and others without.
    """
    variables = {VARIABLE: f"{FACTOR:.2f}"}
    if environ.get("CI") == "true":
        variables["CI"] = "true"
    variables |= getattr(module, "REPEAT_WITH", {})
    words = [
        *(f"{name}={shlex.quote(value)}" for name, value in variables.items()),
        ".venv/bin/pytest",
        shlex.quote(nodeid),
    ]
    return " ".join(words)
