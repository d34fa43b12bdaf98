"""Calls into the kernel that may hang, bounded: one VM whose cgroup or process hangs must not delay the others."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

_PATIENCE_S = 0.25  # s: for all calls of one sweep together; each takes microseconds
_LEAST_S = 0.02  # s: what each gets in any case

T = TypeVar("T")


class NoAnswer(OSError):
    """The call did not return in time, or an earlier one for the same VM has not returned yet."""


def within(patience_s: float, work: Callable[[], T]) -> T:
    """What ``work`` returns, if it does so within ``patience_s`` seconds; else its thread is left to it.

    Raises:
        NoAnswer: it did not.
        OSError: whatever else ``work`` raises.
    """
    calls = BoundedCalls()
    try:
        return calls.call("", work, patience_s)
    finally:
        calls.end()


class BoundedCalls:
    """Runs calls one after the other in a thread, and leaves that thread to a call that hangs."""

    def __init__(self) -> None:
        self._work: SimpleQueue[tuple[Callable[[], Any], SimpleQueue[Any]]] | None = None
        self._stuck: dict[str, SimpleQueue[Any]] = {}
        self._until = 0.0

    @property
    def under_way(self) -> frozenset[str]:
        """The keys of calls that have not returned."""
        for key, answer in list(self._stuck.items()):
            if not answer.empty():
                del self._stuck[key]
        return frozenset(self._stuck)

    def begin_sweep(self) -> None:
        """The calls from now on share one patience."""
        self._until = time.monotonic() + _PATIENCE_S

    def call(self, key: str, work: Callable[[], T], patience_s: float = _LEAST_S) -> T:
        """What ``work`` returns.

        ``patience_s``: the least time that it gets, in seconds, if the sweep's patience is used up.

        Raises:
            NoAnswer: it hangs, or the last call with this ``key`` still does.
            OSError: whatever else ``work`` raises.
        """
        if key in self.under_way:
            raise NoAnswer("the kernel still has not answered")
        answer: SimpleQueue[Any] = SimpleQueue()
        try:
            self._thread().put((work, answer))
        except RuntimeError:  # the host has no room for a thread: better to wait than not to act
            return work()
        try:
            is_error, value = answer.get(timeout=max(self._until - time.monotonic(), patience_s))
        except Empty:
            self._stuck[key] = answer
            self._work = None  # that thread is lost to the others; it ends when its call returns
            raise NoAnswer("the kernel does not answer") from None
        if is_error:
            raise value
        found: T = value
        return found

    def end(self) -> None:
        """No more calls: its thread ends when it has nothing to do."""
        if self._work is not None:
            work, self._work = self._work, None
            work.put((lambda: None, SimpleQueue()))

    def _thread(self) -> SimpleQueue[tuple[Callable[[], Any], SimpleQueue[Any]]]:
        if self._work is None:
            work: SimpleQueue[tuple[Callable[[], Any], SimpleQueue[Any]]] = SimpleQueue()
            threading.Thread(target=self._serve, args=(work,), name="kernel calls", daemon=True).start()
            self._work = work
        return self._work

    def _serve(self, queue: SimpleQueue[tuple[Callable[[], Any], SimpleQueue[Any]]]) -> None:
        while True:
            work, answer = queue.get()
            try:
                result: tuple[bool, Any] = (False, work())
            except BaseException as error:  # noqa: BLE001 - it is raised where the call was made
                result = (True, error)
            answer.put(result)
            if self._work is not queue:
                return
