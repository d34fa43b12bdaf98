"""How a container that runs is resumed, and how it is paused through its engine; the kernel is the witness. Blocking."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from caesura_host_updater.drivers.container.cgroup import NoFreezer, read_freezer
from caesura_host_updater.drivers.container.definition import Inspected, inspected
from caesura_vmcontrol import container_engine
from caesura_vmcontrol.container_control import freeze_container
from caesura_vmcontrol.container_engine import EnginePlan, EngineRefused
from caesura_vmcontrol.procfs import alive, read_process
from caesura_vmcontrol.vm_control import condition

ASK_S = 2.0  # s: for what the engine knows; it takes milliseconds
_STEP_S = 0.002  # s: between two looks at a container that is to be paused

Call = Callable[[str, str, str, float], object]
"""A request to the engine: method, container, what of it, timeout in seconds."""


class NotFrozen(Exception):
    """The container could not be paused; the text says why."""


class PausedBefore(NotFrozen):
    """Somebody else has paused it."""


class PauseUnanswered(NotFrozen):
    """The engine did not answer; it may carry the pause out later."""


def plan_of_container(vm: str, socket: str, found: Inspected) -> EnginePlan | None:
    """How a container that runs is resumed; None: its first process has ended.

    Raises:
        NoFreezer: its cgroup cannot be seen from here, or the engine is on another machine.
        OSError: /proc cannot be read.
    """
    process = read_process(found.pid)
    if process is None or not alive(found.pid, process.start_ticks):
        return None
    freezer, control = read_freezer(found.pid)
    if found.container not in control:
        # An engine in a virtual machine (Docker Desktop) or on another host: here its numbers are those of other processes.
        raise NoFreezer(
            f"process {found.pid} of this machine is not in container {found.container[:12]}: its engine is on another machine"
        )
    return EnginePlan(vm, socket, found.container, found.pid, process.start_ticks, freezer, control)


def engine_call(socket: str) -> Call:
    """Requests about containers to the engine at ``socket``."""
    return lambda method, container, what, timeout_s: container_engine.call(
        socket, method, f"/containers/{container}{what}", timeout_s
    )


def pause_container(plan: EnginePlan, by: float, stop: threading.Event, call: Call) -> None:
    """Have the engine pause it, then look until the kernel says that it is frozen.

    Args:
        by: the instant (CLOCK_MONOTONIC, seconds) until which it must be.
        stop: requests that it is called off.
        call: asks the engine.

    Raises:
        NotFrozen: it is not, and runs unless ``condition`` says otherwise.
    """
    try:
        state = condition(plan)
        if state == "gone":
            raise NotFrozen("has ended")
        if state != "running":
            raise PausedBefore("was paused by somebody else before anything was done")
        # Asked first: a request to an engine that hangs would be carried out whenever that wakes up.
        found = inspected(call("GET", plan.container, "/json", _until(by)))
        if found.pid != plan.pid:
            raise NotFrozen("is not the container that it was: it has ended, or was started again")
        if stop.is_set() or time.monotonic() >= by:
            raise NotFrozen("it was too late to freeze it")
        if found.paused:
            # The engine is wrong: its container was resumed by the cgroup while it was away. Frozen as the engine
            # has it, it can be resumed through it again.
            freeze_container(plan)
        else:
            _request_pause(plan, by, call)
        while (state := condition(plan)) != "frozen":
            if state == "gone":
                raise NotFrozen("ended while it was being frozen")
            if stop.is_set() or time.monotonic() >= by:
                raise NotFrozen(f"is not frozen in time: the kernel says {state}")
            time.sleep(_STEP_S)
    except (OSError, ValueError) as error:
        raise NotFrozen(str(error)) from error


def _request_pause(plan: EnginePlan, by: float, call: Call) -> None:
    try:
        call("POST", plan.container, "/pause", _until(by))
    except EngineRefused:
        raise
    except OSError as error:
        raise PauseUnanswered(str(error)) from error


def _until(by: float) -> float:
    """Seconds until an instant of CLOCK_MONOTONIC, ``ASK_S`` at most."""
    return max(0.001, min(by - time.monotonic(), ASK_S))
