"""``caesura rehearse``: any program gets a real Freeze, on a laptop or in CI. A plug-in of the command, and of pytest."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from caesura_rehearse.testing.fixture import Rehearsal, RehearsalAssertion, RehearsalError

__all__ = ["Rehearsal", "RehearsalAssertion", "RehearsalError"]


def __getattr__(name: str) -> object:
    # The pytest plug-in is imported by every test run: what it does not need is not imported with it.
    if name in __all__:
        from caesura_rehearse.testing import fixture  # noqa: PLC0415

        return getattr(fixture, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
