"""What drivers share whose VMs are found on a platform that starts and stops them: looks at it, and VMs of an operation."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Generic, TypeVar

from caesura.runtime.logs import get_logger

P = TypeVar("P")

_log = get_logger("caesura.driver")


class SingleLook:
    """A look at the platform: never two at a time, however long one takes, and nobody waits for one longer than its patience.

    Args:
        look: handles its own errors.
        patience_s: seconds.
        on_silence: called when a look has taken longer.
    """

    def __init__(
        self, look: Callable[[], Awaitable[None]], patience_s: float, on_silence: Callable[[], None]
    ) -> None:
        self._look = look
        self._patience_s = patience_s
        self._on_silence = on_silence
        self._now: asyncio.Future[None] | None = None

    async def take(self) -> None:
        """Look, or wait for the look that is under way. Raises what that does."""
        if self._now is None or self._now.done():
            self._now = asyncio.ensure_future(self._look())
        await asyncio.wait([self._now], timeout=self._patience_s)
        if not self._now.done():
            self._on_silence()
            return
        self._now.result()


class VmsOfOperation(Generic[P]):
    """VMs of an operation: they stay members until it is over, wherever the platform has them then.

    Args:
        is_same_life: whether two plans are of the same process; a VM may have been started again since it was paused.
    """

    def __init__(self, is_same_life: Callable[[P, P], bool]) -> None:
        self._is_same_life = is_same_life
        self._names: set[str] = set()
        self._paused: dict[str, P] = {}

    def __contains__(self, vm: str) -> bool:
        return vm in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self._names))

    def add(self, vm: str) -> None:
        """It belongs to one from now on."""
        self._names.add(vm)

    def pausing(self, vm: str, plan: P) -> None:
        """It is about to be paused in this life."""
        self._names.add(vm)
        self._paused[vm] = plan

    def remove(self, vm: str) -> bool:
        """The operation is over; False: there was none."""
        self._paused.pop(vm, None)
        if vm not in self._names:
            return False
        self._names.discard(vm)
        return True

    def was_started_again(self, vm: str, plan: P | None) -> bool:
        """Whether what runs now is not what was to be paused: that has ended, and its memory is lost."""
        paused = self._paused.get(vm)
        return paused is not None and plan is not None and not self._is_same_life(paused, plan)


def log_members(before: Mapping[str, str], now: Mapping[str, str], hint: str) -> None:
    """Log which VMs came and went.

    Args:
        before: their names on the bus to what the platform calls them.
        hint: what may have happened to one that is gone.
    """
    for vm in now.keys() - before.keys():
        _log.info("vm.found", vm=vm, called=now[vm])
    for vm in before.keys() - now.keys():
        _log.warning("vm.left", vm=vm, called=before[vm], hint=hint)


def log_passed(before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Log what cannot be a VM, each with its reason, once."""
    for place, why in now.items():
        if before.get(place) != why:
            _log.warning("discovery.passed_over", place=place, why=why)
