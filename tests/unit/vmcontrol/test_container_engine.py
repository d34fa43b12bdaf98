"""The guard's way to a container engine: one deadline for each call, the engine first, the kernel when that is dead or hangs."""

from __future__ import annotations

import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest

from caesura_testing.patience import patient
from caesura_vmcontrol import container_engine, freezer_control
from caesura_vmcontrol.container_control import freeze_container
from caesura_vmcontrol.container_engine import (
    EngineGone,
    EnginePlan,
    EngineRefused,
    EngineSilent,
    call,
    request,
)
from caesura_vmcontrol.freezer_control import Condition
from caesura_vmcontrol.intent import Intent
from caesura_vmcontrol.plan_errors import BadPlan
from caesura_vmcontrol.resume_plans import ResumePlan, mechanism_of, plan_from_json, plan_to_json
from caesura_vmcontrol.vm_control import resume_vm
from caesura_vmcontrol.watchdog import Watchdog

ID = "0123456789abcdef" * 4
CONTROL = f"/sys/fs/cgroup/freezer/docker/{ID}/freezer.state"


class FakeEngine:
    """Listens on a unix socket and answers as it is told to; it never answers while ``hangs`` is set."""

    def __init__(self, folder: str) -> None:
        self.path = f"{folder}/engine.sock"
        self.asked: list[str] = []
        self.answer = b"HTTP/1.0 204 No Content\r\n\r\n"
        self.drips = False
        self.hangs = threading.Event()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(self.path)
        self._listener.listen()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while not self._end.is_set():
            with suppress(OSError):
                connection, _ = self._listener.accept()
                with connection:
                    self.asked.append(connection.recv(4096).decode().split(" HTTP")[0])
                    if self.hangs.is_set():
                        self._end.wait(patient(10))
                    elif self.drips:
                        until = time.monotonic() + patient(3)
                        while not self._end.wait(0.01) and time.monotonic() < until:
                            connection.sendall(b"x")
                    else:
                        connection.sendall(self.answer)

    def close(self) -> None:
        """Nobody listens any more."""
        self._end.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(patient(10))


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    # pytest's own folders are too deep for the path of a socket.
    with tempfile.TemporaryDirectory(prefix="caesura-engine-") as folder:
        made = FakeEngine(folder)
        yield made
        made.close()


def plan(engine: FakeEngine) -> EnginePlan:
    """Of one container."""
    return EnginePlan("a", engine.path, ID, os.getpid(), 1, "cgroup1", CONTROL)


class Kernel:
    """The container's freezer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.state: Condition = "frozen"
        self.thaws = 0
        monkeypatch.setattr(freezer_control, "_condition_v1", lambda _: self.state)
        monkeypatch.setattr(freezer_control, "_write", self._write)

    def _write(self, path: str, text: str) -> None:
        assert (path, text) == (CONTROL, "THAWED"), "nothing above the container's own group"
        self.thaws += 1
        self.state = "running"


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    return Kernel(monkeypatch)


def test_an_answer_and_an_error(engine: FakeEngine) -> None:
    engine.answer = b'HTTP/1.0 200 OK\r\nContent-Type: application/json\r\n\r\n{"Id": "x"}\n'
    assert call(engine.path, "GET", "/containers/x/json", 5) == {"Id": "x"}
    engine.answer = b'HTTP/1.1 409 Conflict\r\n\r\n{"message":"Container x is not paused"}'
    with pytest.raises(EngineRefused, match="409: Container x is not paused") as caught:
        call(engine.path, "POST", "/containers/x/unpause", 5)
    assert caught.value.status == 409
    engine.answer = b"HTTP/1.0 500 Oh\r\n\r\n<html>"
    with pytest.raises(EngineRefused, match="500: <html>"):
        call(engine.path, "GET", "/info", 5)
    for strange in (b"", b"SSH-2.0-x\r\n", b"HTTP/1.0 OK\r\n\r\n"):
        engine.answer = strange
        with pytest.raises(EngineGone, match="does not speak HTTP"):
            request(engine.path, "GET", "/_ping", 5)


@pytest.mark.parametrize("drips", [False, True])
def test_an_engine_that_hangs_holds_nobody_beyond_the_deadline(engine: FakeEngine, drips: bool) -> None:
    """Also one that sends a byte now and then: the deadline is for the whole call."""
    engine.drips = drips
    if not drips:
        engine.hangs.set()
    began = time.monotonic()
    with pytest.raises(EngineSilent, match=r"does not answer within 0\.2 s"):
        request(engine.path, "GET", "/_ping", 0.2)
    assert time.monotonic() - began < patient(1.0)


def test_no_engine(engine: FakeEngine) -> None:
    engine.close()
    with pytest.raises(EngineGone, match="Connection refused"):
        request(engine.path, "GET", "/_ping", 1)
    with pytest.raises(EngineGone, match="No such file"):
        request(f"{engine.path}.not", "GET", "/_ping", 1)


def test_a_live_engine_resumes_and_the_kernel_is_not_touched(engine: FakeEngine, kernel: Kernel) -> None:
    resume_vm(plan(engine))
    assert engine.asked == [f"POST /containers/{ID}/unpause"]
    assert kernel.thaws == 0


@pytest.mark.parametrize("how", ["dead", "hangs", "refuses"])
def test_the_kernel_resumes_what_the_engine_does_not(
    engine: FakeEngine, kernel: Kernel, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(container_engine.unpause, "__defaults__", (0.1,))
    if how == "dead":
        engine.close()
    elif how == "hangs":
        engine.hangs.set()
    else:
        engine.answer = b'HTTP/1.0 500 No\r\n\r\n{"message":"cannot resume"}'
    resume_vm(plan(engine))
    assert (kernel.state, kernel.thaws) == ("running", 1)


def test_a_container_with_groups_below_its_own_is_resumed_in_all_of_them(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its engine froze the one above that of its first process: an init system inside made the lower one."""
    above = f"/sys/fs/cgroup/system.slice/docker-{ID}.scope"
    one = EnginePlan("a", engine.path, ID, os.getpid(), 1, "cgroup2", f"{above}/init.scope/cgroup.freeze")
    written: list[tuple[str, str]] = []
    monkeypatch.setattr(freezer_control, "_condition_v2", lambda _: "frozen")
    monkeypatch.setattr(freezer_control, "_write", lambda *each: written.append(each))
    engine.close()
    resume_vm(one)
    assert written == [(one.control, "0"), (f"{above}/cgroup.freeze", "0")]
    written.clear()
    freeze_container(one)
    assert written == [(f"{above}/cgroup.freeze", "1")], "as its engine does"


@pytest.mark.parametrize("state", ["running", "gone"])
def test_an_engine_that_refuses_because_it_runs_already_is_no_reason_to_touch_the_cgroup(
    engine: FakeEngine, kernel: Kernel, state: Condition
) -> None:
    kernel.state = state
    engine.answer = b'HTTP/1.0 409 Conflict\r\n\r\n{"message":"is not paused"}'
    resume_vm(plan(engine))
    assert kernel.thaws == 0


def test_one_hung_engine_delays_no_other_container(
    engine: FakeEngine,
) -> None:
    """Each in a round of its own, as QEMU guests are (I2)."""
    answers = threading.Event()
    released: list[str] = []
    states: dict[str, Condition] = {"slow": "frozen", "quick": "frozen"}

    def release(each: ResumePlan, _: object) -> None:
        if each.vm == "slow":
            answers.wait(patient(20))
        released.append(each.vm)
        states[each.vm] = "running"

    class Nowhere:
        """Keeps nothing."""

        def store(self, _: Intent) -> None:
            """Nothing."""

        def clear(self) -> None:
            """Nothing."""

    of = {vm: EnginePlan(vm, engine.path, ID, os.getpid(), 1, "cgroup1", CONTROL) for vm in ("slow", "quick")}
    watch = Watchdog(Nowhere(), lambda *_, **__: None, look=lambda each, _: states[each.vm], release=release)
    now = time.monotonic()
    watch.arm(Intent("op", "boot", now, now + 60, tuple(of.values())))
    watch.fire("the test says so")
    until = time.monotonic() + patient(5)
    while released != ["quick"] and time.monotonic() < until:
        watch.step()
        time.sleep(0.005)
    assert released == ["quick"]
    answers.set()
    while watch.state == "firing" and time.monotonic() < until + patient(10):
        watch.step()
        time.sleep(0.005)
    assert released == ["quick", "slow"]


def test_a_plan_survives_the_way_to_disk_and_a_bad_one_is_refused(engine: FakeEngine) -> None:
    one = plan(engine)
    data = plan_to_json(one)
    assert plan_from_json(data) == one
    assert mechanism_of(one) == "engine"
    for change in (
        {"socket": "engine.sock"},
        {"container": "web-1"},
        {"container": f"../{ID[3:]}"},
        {"pid": 0},
        {"start_ticks": "1"},
        {"freezer": "cgroup3"},
        {"control": "/etc/passwd"},
        {"control": f"/sys/fs/cgroup/../../etc/{ID}/freezer.state"},
    ):
        with pytest.raises(BadPlan):
            plan_from_json({**data, **change})
    for key in data.keys() - {"kind"}:
        with pytest.raises(BadPlan):
            plan_from_json({each: value for each, value in data.items() if each != key})
