"""Errors of the pure machines."""

from __future__ import annotations

from caesura.runtime.errors import CaesuraError


class IllegalTransition(CaesuraError):
    """A machine was asked to go where it cannot go from where it is."""

    def __init__(self, subject: str, from_state: str, to_state: str) -> None:
        self.subject = subject
        self.from_state = from_state
        self.to_state = to_state
        super().__init__(f"{subject} cannot go from {from_state!r} to {to_state!r}")
