"""How much memory the kernel could give to a new process. Blocking."""

from __future__ import annotations

from pathlib import Path


def available_bytes(file: Path = Path("/proc/meminfo")) -> int:
    """MemAvailable, which counts what the page cache would give back. Source: proc(5).

    Raises:
        OSError: it cannot be read, or says nothing of it.
    """
    for line in file.read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) << 10
    raise OSError(f"{file} has no MemAvailable")
