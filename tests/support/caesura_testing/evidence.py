"""What a failed test leaves behind for the person who looks for the cause."""

from __future__ import annotations

from pathlib import Path

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
