"""Under whose name and epoch commands are sent. Pure."""

from __future__ import annotations

from caesura_coordinator.records import StateRecord


class Authority(StateRecord, frozen=True, kw_only=True):
    """The coordinator and epoch under which commands are sent."""

    coordinator: str
    epoch: int
