"""How long changes of this host's kernel took: a small file beside the journal, for it must outlive what it measures."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import msgspec

from caesura.contract.messages import KernelFigure
from caesura_vmcontrol.durable_files import write_durably

FILE = "kexec-figures.json"
_MOST = 32  # as many as an inventory holds


def newest_of_each(figures: Iterable[KernelFigure]) -> tuple[KernelFigure, ...]:
    """One for each kernel, the newest measurement; the newest kernels where there are too many."""
    newest: dict[str, KernelFigure] = {}
    for each in sorted(figures, key=lambda each: each.at):
        newest[each.to] = each
    return tuple(sorted(newest.values(), key=lambda each: each.at)[-_MOST:])


def read_figures(folder: Path) -> tuple[KernelFigure, ...]:
    """What was measured; nothing, where the file is missing or is not ours: then nothing is planned. Blocking."""
    try:
        return msgspec.json.decode((folder / FILE).read_bytes(), type=tuple[KernelFigure, ...])
    except (OSError, msgspec.DecodeError):
        return ()


def add_figure(folder: Path, figure: KernelFigure) -> tuple[KernelFigure, ...]:
    """Keep a measurement; all of them now. Blocking. Raises OSError."""
    # Whatever the clock said at the one before it: that was measured earlier.
    others = (each for each in read_figures(folder) if each.to != figure.to)
    figures = newest_of_each((*others, figure))
    write_durably(str(folder), FILE, msgspec.json.encode(figures))
    return figures
