"""A terminal on which what others wrote does nothing: see ``caesura.runtime.visible``."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from caesura.runtime.visible import visible, visible_json

__all__ = ["VisibleConsole", "visible", "visible_json"]


class VisibleConsole(Console):
    """A console on which no text does anything; colours and movements are the renderer's own."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """As rich does it."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=visible(segment.text))
