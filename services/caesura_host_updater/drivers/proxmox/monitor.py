"""One VM's QMP socket, which Proxmox's own tools use, too: connect, ask, leave. Everything here blocks.

QEMU serves one client of a socket at a time, and Proxmox's tools give up after a few seconds. So no connection is kept: each is
over within milliseconds, and waits for its turn behind others. QEMU carries out the commands of all its connections one after the other and
drops those of a connection that has ended: once it answers again, none of our earlier ``stop`` commands is pending.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import msgspec

from caesura_vmcontrol.qemu_plans import QemuPlan
from caesura_vmcontrol.qmp import Qmp, QmpError, QmpNoAnswer
from caesura_vmcontrol.qmp_commands import NOT_OURS, RUNNING, reach, run_state

_AGENT = "qga0"
"""What Proxmox calls the guest agent's character device."""


class GuestState(msgspec.Struct, frozen=True):
    """What QEMU says of its guest.

    Args:
        status: QEMU's word (RunState).
        agent_open: whether a guest agent has opened its port in the guest.
    """

    status: str
    agent_open: bool = False


class GuestNotStopped(OSError):
    """Nothing was done to a guest; the text says why."""


class GuestPausedBefore(GuestNotStopped):
    """Somebody else had paused it."""


def ask_state(plan: QemuPlan, until: float, *, agent: bool = False) -> GuestState:
    """The state of a guest, and with ``agent`` whether its guest agent is there.

    Raises:
        ProcessGone: its process has ended.
        QmpError: it does not answer by ``until``.
    """
    with _connected(plan, until) as qmp:
        status = run_state(qmp, until)
        return GuestState(status, agent and _agent_open(qmp, until))


def _agent_open(qmp: Qmp, until: float) -> bool:
    for device in qmp.execute("query-chardev", until=until):
        if device.get("label") == _AGENT:
            return bool(device.get("frontend-open"))
    return False


def stop_guest(plan: QemuPlan, until: float, give_up: Callable[[], bool]) -> None:
    """Pause a guest that runs, and have QEMU say that it is paused. One connection: nobody else's command comes in between.

    Raises:
        GuestPausedBefore: somebody else had paused it.
        GuestNotStopped: nothing was done: it does not run, QEMU does not answer, or ``give_up`` said so.
        ProcessGone: its process has ended.
        QmpError: the ``stop`` failed, or there was no answer to it by ``until``; it may be paused.
    """
    try:
        connection = _connected(plan, until)
    except QmpNoAnswer as error:
        raise GuestNotStopped(str(error)) from error
    with connection as qmp:
        try:
            status = run_state(qmp, until)
        except QmpNoAnswer as error:
            raise GuestNotStopped(str(error)) from error
        if status == "paused":
            raise GuestPausedBefore("it was paused by somebody else before anything was done")
        if status not in RUNNING:
            raise GuestNotStopped(NOT_OURS.get(status, f"it does not run: QEMU says {status}"))
        if give_up() or time.monotonic() >= until:
            raise GuestNotStopped("it was too late to freeze it")
        qmp.execute("stop", until=until)
        status = run_state(qmp, until)
    if status != "paused":
        raise QmpError(f"QEMU says {status} after a stop")


def _connected(plan: QemuPlan, until: float) -> Qmp:
    vmm = plan.vmm
    if not os.access(vmm.qmp, os.W_OK):
        raise QmpNoAnswer(f"{vmm.qmp} is not there, or may not be used by this user")
    try:
        return reach(vmm.pid, vmm.start_ticks, [vmm.qmp], until)
    except QmpNoAnswer as error:
        raise QmpNoAnswer(f"{error}: QEMU hangs, or serves another client at its QMP socket") from error
