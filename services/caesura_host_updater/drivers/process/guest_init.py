"""The first process of a process VM: starts the VM's processes, reaps, forwards SIGTERM, ends with them.

Run by path with ``python -I -S`` (some 15 ms): standard library only, none of our imports. Its argument is a
JSON file written by the process driver. It writes who it is into the run file itself, under a lock that it
holds for life, so a host updater that died between starting it and writing that down starts no second VM.
Where the file names a descriptor (``report_fd``), it also reports there: a line of JSON when the VM's processes run, one when
one of them ended, one if the VM cannot be started.

It is a child subreaper: a process that leaves its process group and session, or whose parent dies, stays in
this tree and is found when the VM is frozen. Its direct children die with it (PR_SET_PDEATHSIG).
"""

# light imports, no pathlib; running the host file's argv is what it is for.
# ruff: noqa: PTH105, PTH110, PTH123, PTH208, S606

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import signal
import sys

TYPE_CHECKING = False  # as `typing` has it, without the milliseconds of importing it
if TYPE_CHECKING:
    from typing import Any

SIGNALS = frozenset((signal.SIGTERM, signal.SIGALRM, signal.SIGCHLD))
"""Blocked, and taken by ``sigwait``: a handler that is set off just before a system call waits is run when that returns."""
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
ending: list[bool] = []
"""Not empty once the VM was asked to end."""
reporting: list[int] = []
"""The descriptor of the report, if there is one."""
TERM_GRACE_S = 3  # s: between SIGTERM and SIGKILL of the VM's processes


def main(spec_path: str) -> int:
    """Run the VM described by the file. Exit code: the first that is not 0 among its processes, else 0."""
    with open(spec_path, encoding="utf-8") as file:
        spec = json.load(file)
    report_to(spec.get("report_fd"))
    lock = os.open(spec["lock_file"], os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return fail("this VM runs already")
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        return fail(f"prctl: {os.strerror(ctypes.get_errno())}")
    try:
        if spec["cgroup_procs"]:
            write(spec["cgroup_procs"], b"0", os.O_WRONLY)
        children: dict[int, str] = {}
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        for process in spec["processes"]:
            children[start(process, libc)] = process["argv"][0]
        run = {**spec["run"], "pid": os.getpid(), "start_ticks": start_ticks()}
        write(spec["run_file"] + ".new", json.dumps(run).encode(), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.replace(spec["run_file"] + ".new", spec["run_file"])
        report(started=run["pid"], start_ticks=run["start_ticks"], processes=list(children))
    except OSError as error:
        kill_all()
        return fail(str(error))
    return reap(children, spec["ended_file"], spec["shutdown_file"])


def start(process: dict[str, Any], libc: ctypes.CDLL) -> int:
    """Start one process; OSError if its program cannot be run (the child says so through a pipe)."""
    read, write_end = os.pipe2(os.O_CLOEXEC)
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        try:
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != parent:
                os._exit(127)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            signal.signal(
                signal.SIGPIPE, signal.SIG_DFL
            )  # Python ignores it, and a program that is executed would, too
            os.execvpe(process["argv"][0], process["argv"], process["environ"])
        except OSError as error:
            os.write(write_end, f"{process['argv'][0]}: {error.strerror}".encode())
        os._exit(127)
    os.close(write_end)
    trouble = os.read(read, 4096)
    os.close(read)
    if trouble:
        os.waitpid(pid, 0)
        raise OSError(f"cannot start {trouble.decode(errors='replace')}")
    return pid


def reap(children: dict[int, str], ended_file: str, shutdown_file: str) -> int:
    """Wait until the last of the VM's own processes ended; strays are reaped and end with us.

    One that failed while others run on is noted in ``ended_file``, a line each: the VM is not what it was. While there is a
    ``shutdown_file`` every process was asked to end: a non-zero exit does not count, and strays are waited for, not killed.
    """
    code = 0
    while children or (os.path.exists(shutdown_file) and descendants()):
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            break
        if pid == 0:
            number = signal.sigwait(SIGNALS)
            if number == signal.SIGTERM:
                terminate(children)
            elif number == signal.SIGALRM:
                kill_all()
            continue
        program = children.pop(pid, None)
        if program is not None:
            own = os.waitstatus_to_exitcode(status)
            code = code or abs(own)
            if reporting:
                report(ended=pid, code=own, left=sorted(set(descendants()) - set(children)))
            if own != 0 and children and not ending and not os.path.exists(shutdown_file):
                note(ended_file, f"{program} {how(own)}")
    kill_all()
    return min(code, 255)


def how(code: int) -> str:
    """How a process ended, from its exit code, or its signal as a negative number."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"


def note(path: str, line: str) -> None:
    """Add a line to a file; a full disk must not end the VM."""
    try:
        write(path, f"{line}\n".encode(), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    except OSError as error:
        fail(f"{line}; it cannot be noted: {error.strerror}")


def terminate(children: dict[int, str]) -> None:
    """SIGTERM to the VM's processes; SIGKILL for what is left after the grace."""
    ending.append(True)
    for pid in children:
        try:
            os.kill(pid, signal.SIGTERM)
        except ProcessLookupError:
            continue
    signal.alarm(TERM_GRACE_S)


def kill_all() -> None:
    """SIGKILL everything below us: what leaves our session is re-parented to us, so look until none is left."""
    for _ in range(100):
        below = descendants()
        for pid in below:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if not below:
            return
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def descendants() -> list[int]:
    """Pids of all living processes below us."""
    parents: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    fields = file.read().rpartition(b")")[2].split()
            except OSError:
                continue
            if fields[0] != b"Z":
                parents.setdefault(int(fields[1]), []).append(int(name))
    found: list[int] = []
    queue = [os.getpid()]
    while queue:
        below = parents.get(queue.pop(), [])
        found += below
        queue += below
    return found


def start_ticks() -> int:
    """Our own start time, clock ticks since boot."""
    with open("/proc/self/stat", "rb") as file:
        return int(file.read().rpartition(b")")[2].split()[19])


def write(path: str, data: bytes, flags: int) -> None:
    """Write a small file in one go."""
    handle = os.open(path, flags | os.O_CLOEXEC, 0o600)
    try:
        os.write(handle, data)
    finally:
        os.close(handle)


def report_to(descriptor: int | None) -> None:
    """Where ``report`` writes; the VM's processes do not inherit it."""
    if descriptor is not None:
        os.set_inheritable(descriptor, False)
        reporting.append(descriptor)


def report(**facts: Any) -> None:
    """Write a line of JSON, if anybody wants it; a reader that is gone must not end the VM."""
    for descriptor in reporting:
        try:
            os.write(descriptor, json.dumps(facts).encode() + b"\n")
        except OSError:
            reporting.clear()


def fail(why: str) -> int:
    """Say why the VM does not start, in the report if there is one, else on stderr (the VM's log file)."""
    if reporting:
        report(failed=why)
        return 125
    os.write(2, f"guest_init: {why}\n".encode())
    return 125


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
