"""Tables that drop columns if a terminal is too narrow, and never break a name or an identifier. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

Cell = str | Text
_GAP = 3
"""Characters between two columns: a blank on each side, and the line that is not drawn."""
_EDGES = 2
"""Characters of the two outer lines that are not drawn."""
_TEXT = 24
"""The least width of a column of sentences, if it has that many characters; a longer word in it may be broken."""


class Columns:
    """A table that omits the least important columns until no name has to be broken.

    Args:
        columns: headings; ``>`` before one: right-aligned; ``~``: sentences, in which long words may be broken.
        drop: headings (without marks), the least important one first. The others are never omitted.
        one_line: cut long texts instead of wrapping them.
    """

    def __init__(
        self, *columns: str, drop: Sequence[str] = (), title: str | None = None, one_line: bool = False
    ) -> None:
        self._headings = [column.lstrip(">~") for column in columns]
        self._right = [column.startswith(">") for column in columns]
        self._prose = [column.startswith("~") for column in columns]
        self._drop = drop
        self._title = title
        self._one_line = one_line
        self._rows: list[tuple[Text, ...]] = []

    @property
    def row_count(self) -> int:
        """The number of rows."""
        return len(self._rows)

    def add_row(self, *cells: Cell) -> None:
        """One row."""
        self._rows.append(tuple(cell if isinstance(cell, Text) else Text(cell) for cell in cells))

    def shown(self, width: int) -> list[str]:
        """The headings shown at this width."""
        return [self._headings[at] for at in self._kept(width)]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """As rich asks for it."""
        yield self._table(options.max_width)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        """As rich asks for it."""
        return Measurement.get(console, options, self._table(options.max_width))

    def _table(self, width: int) -> Table:
        table = Table(
            box=box.SIMPLE_HEAD,
            title=self._title,
            title_justify="left",
            title_style="bold",
            pad_edge=False,
        )
        kept = self._kept(width)
        for at, wide in zip(kept, self._widths(kept, width), strict=True):
            table.add_column(
                self._headings[at],
                justify="right" if self._right[at] else "left",
                overflow="ellipsis" if self._one_line else "fold",
                no_wrap=self._one_line,
                width=wide,
            )
        for row in self._rows:
            cells: Iterable[RenderableType] = (row[at] for at in kept)
            table.add_row(*cells)
        return table

    def _kept(self, width: int) -> list[int]:
        kept = list(range(len(self._headings)))
        for name in self._drop:
            if sum(self._least(at) + _GAP for at in kept) - _GAP + _EDGES <= width:
                break
            kept.remove(self._headings.index(name))
        return kept

    def _widths(self, kept: Sequence[int], width: int) -> list[int]:
        """The width of each column: what it needs, plus a share of the rest, those first that need little more."""
        got = {at: self._least(at) for at in kept}
        left = max(0, width - _EDGES - _GAP * (len(kept) - 1) - sum(got.values()))
        more = {at: self._most(at) - got[at] for at in kept}
        for share, at in enumerate(sorted(kept, key=lambda each: more[each])):
            given = min(more[at], left // (len(kept) - share))
            got[at] += given
            left -= given
        return [got[at] for at in kept]

    def _most(self, at: int) -> int:
        """Characters that the column would fill in one line."""
        cells = [self._headings[at], *(line for row in self._rows for line in row[at].plain.splitlines())]
        return max(self._least(at), *(cell_len(cell) for cell in cells))

    def _least(self, at: int) -> int:
        """Characters that the column needs, so that no word of it is broken."""
        cells = [self._headings[at], *(row[at].plain for row in self._rows)]
        if self._right[at]:
            return max(cell_len(cell) for cell in cells)
        if self._prose[at]:
            return min(_TEXT, max(cell_len(line) for cell in cells for line in [*cell.splitlines(), ""]))
        return max((cell_len(word) for cell in cells for word in cell.split()), default=0)


def first_of(names: Sequence[str], most: int) -> str:
    """The first of these names, and the number of the others."""
    left = len(names) - most
    return ", ".join(names[:most]) + (f" +{left}" if left > 0 else "")
