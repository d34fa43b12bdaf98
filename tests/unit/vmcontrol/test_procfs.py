"""What the kernel says of a process that ends: it may be on its way for a while."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys

from caesura_vmcontrol.procfs import alive, ending, read_process

_HOLDS_MUCH = """
import os, resource, sys, time
most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
for _ in range(min(most - 20, 15_000)):
    os.eventfd(0)
ours = os.dup(int(sys.argv[1]))  # the kernel gives back the newest first
os.close(int(sys.argv[1]))
os.write(ours, b"x")
time.sleep(600)
"""


def test_end_is_known_by_the_time_its_connection_ends() -> None:
    """A QEMU that was killed was said to be *unknown: it does not answer* for some milliseconds."""
    for _ in range(5):
        ours, its = socket.socketpair()
        with ours, its:
            argv = [sys.executable, "-S", "-c", _HOLDS_MUCH, str(its.fileno())]
            process = subprocess.Popen(argv, pass_fds=[its.fileno()])
            its.close()
            assert ours.recv(1) == b"x"
            seen = read_process(process.pid)
            assert seen is not None
            assert not ending(process.pid, seen.start_ticks)
            os.kill(process.pid, signal.SIGKILL)
            assert ours.recv(1) == b""
            assert ending(process.pid, seen.start_ticks)
        process.wait()
        assert not alive(process.pid, seen.start_ticks)
        assert ending(process.pid, seen.start_ticks)


def test_another_process_with_the_same_pid_is_not_meant() -> None:
    own = read_process(os.getpid())
    assert own is not None
    assert ending(own.pid, own.start_ticks + 1)
    assert not ending(own.pid, own.start_ticks)
