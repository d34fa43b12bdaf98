"""Errors of the pure state machines."""

from __future__ import annotations

from caesura.runtime.errors import CaesuraError


class IllegalStatusChange(CaesuraError):
    """A transition that the current state does not allow."""

    def __init__(self, subject: str, from_state: str, to_state: str) -> None:
        self.subject = subject
        self.from_state = from_state
        self.to_state = to_state
        super().__init__(f"{subject} cannot go from {from_state!r} to {to_state!r}")
