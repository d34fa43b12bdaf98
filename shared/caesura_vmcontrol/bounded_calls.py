"""Calls into the kernel that may hang, bounded: one VM whose cgroup or process hangs must not delay the others."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

_PATIENCE_S = 0.25  # s: for all calls of one sweep together; each takes microseconds
_LEAST_S = 0.02  # s: the least that each gets

T = TypeVar("T")


class CallTimeout(OSError):
    """The call did not return in time, or an earlier one for the same VM has not returned yet."""


class _Call:
    """One call of ``within``, in a thread of its own."""

    def __init__(self, key: object, work: Callable[[], Any], discard: Callable[[Any], None] | None) -> None:
        self.key = key
        self.answer: SimpleQueue[tuple[bool, Any]] = SimpleQueue()
        self._work = work
        self._discard = discard

    def run(self) -> None:
        """In the thread: the caller that waits gets the result; if no caller waits any more, the result is discarded."""
        try:
            is_error, result = False, self._work()
        except BaseException as error:  # noqa: BLE001 - it is raised where the call was made
            is_error, result = True, error
        with _lock:
            if self not in _given_up:
                self.answer.put((is_error, result))
                return
        if not is_error and self._discard is not None:
            with suppress(OSError):
                self._discard(result)
        with _lock:
            _given_up.discard(self)

    def give_up(self) -> bool:
        """Whether no caller waits from now on; false: the answer has arrived."""
        with _lock:
            if self.answer.empty():
                _given_up.add(self)
                return True
            return False


_lock = threading.Lock()
_given_up: set[_Call] = set()
"""The calls that were given up and have not returned."""


def within(
    patience_s: float,
    work: Callable[[], T],
    *,
    key: object = None,
    discard: Callable[[T], None] | None = None,
) -> T:
    """What ``work`` returns, if it returns within ``patience_s`` seconds; otherwise its thread is abandoned to it.

    It is not called again while an earlier call with the same ``key`` that was given up has not returned: repeated
    tries would leave one thread each. ``key``: what the call waits for, such as a path; by default the same function
    with the same captured values is the same call.

    ``discard``: what is done with a result that arrives too late, such as closing it, in that thread.

    Raises:
        CallTimeout: it did not.
        OSError: whatever else ``work`` raises.
    """
    call = _Call(_identity(work) if key is None else key, work, discard)
    with _lock:
        if any(each.key == call.key for each in _given_up):
            raise CallTimeout("the kernel still has not answered")
    try:
        threading.Thread(target=call.run, name="bounded call", daemon=True).start()
    except RuntimeError:  # the host cannot start a thread: waiting is better than not acting
        return work()
    try:
        is_error, result = call.answer.get(timeout=patience_s)
    except Empty:
        if call.give_up():
            raise CallTimeout("the kernel does not answer") from None
        is_error, result = call.answer.get()
    if is_error:
        raise result
    found: T = result
    return found


def _identity(work: Callable[[], Any]) -> object:
    captured = getattr(work, "__closure__", None) or ()
    return getattr(work, "__code__", work), tuple(cell.cell_contents for cell in captured)


class BoundedCalls:
    """Runs calls one after the other in a thread, and abandons that thread to a call that hangs."""

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
        """The calls from now on share one budget of patience."""
        self._until = time.monotonic() + _PATIENCE_S

    def call(self, key: str, work: Callable[[], T], patience_s: float = _LEAST_S) -> T:
        """What ``work`` returns.

        ``patience_s``: the least time that it gets, in seconds, if the sweep's patience is used up.

        Raises:
            CallTimeout: it hangs, or the last call with this ``key`` still hangs.
            OSError: whatever else ``work`` raises.
        """
        if key in self.under_way:
            raise CallTimeout("the kernel still has not answered")
        answer: SimpleQueue[Any] = SimpleQueue()
        try:
            self._thread().put((work, answer))
        except RuntimeError:  # the host cannot start a thread: waiting is better than not acting
            return work()
        try:
            is_error, value = answer.get(timeout=max(self._until - time.monotonic(), patience_s))
        except Empty:
            self._stuck[key] = answer
            self._work = None  # other calls cannot use that thread; it ends when its call returns
            raise CallTimeout("the kernel does not answer") from None
        if is_error:
            raise value
        found: T = value
        return found

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
