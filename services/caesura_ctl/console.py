"""A terminal on which text from others has no side effects: see ``caesura.runtime.visible``."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from caesura.runtime.visible import visible, visible_json

__all__ = ["VisibleConsole", "visible", "visible_json"]


class VisibleConsole(Console):
    """A console on which no text has side effects; colours and cursor movements come only from the renderer."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """As in rich."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=visible(segment.text))
