"""The guest agent's client and the clock, against agents that are absent, silent, talkative, wrong or lying."""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from caesura_host_updater.drivers import clock_setting
from caesura_host_updater.drivers.clock_setting import (
    GuestTimeSample,
    best,
    next_action,
    sample,
    set_clock,
)
from caesura_host_updater.drivers.guest_agent import (
    AgentGarbage,
    AgentRefused,
    AgentSilent,
    guest_agent,
)
from caesura_host_updater.drivers.port import DriverError
from caesura_testing.patience import patient

MS = 1_000_000
S = 1_000_000_000


class Guest:
    """A guest agent with a clock of its own; tests bend single answers."""

    def __init__(self) -> None:
        self.offset_ns = -5 * S
        self.set_leaves_ns = -2 * MS
        self.step_leaves_ns = 20_000
        self.programs = {clock_setting.STEP_PROGRAM}
        self.bent: dict[str, Callable[[dict[str, Any]], bytes]] = {}
        self.asked: list[str] = []
        self.first: bytes = b""
        self.connections = 0
        self.lost_synchronisations = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            writer.write(self.first)
            while line := await reader.readline():
                marked = line.startswith(b"\xff")
                request = json.loads(line.lstrip(b"\xff"))
                self.asked.append(request["execute"])
                if marked:
                    # A real agent complains about the byte itself first.
                    writer.write(b'{"error": {"class": "GenericError", "desc": "JSON parse error, stray"}}\n')
                bend = self.bent.get(request["execute"])
                writer.write(bend(request) if bend else self.answer(request))
        except ConnectionError:
            pass
        finally:
            writer.close()

    def now_ns(self) -> int:
        return time.time_ns() + self.offset_ns

    def answer(self, request: dict[str, Any]) -> bytes:
        arguments = request.get("arguments", {})
        match request["execute"]:
            case "guest-sync-delimited":
                if self.lost_synchronisations:
                    self.lost_synchronisations -= 1
                    return b""
                return b"\xff" + reply(arguments["id"])
            case "guest-ping":
                return reply({})
            case "guest-get-time":
                return reply(self.now_ns())
            case "guest-set-time":
                self.offset_ns = arguments["time"] - time.time_ns() + self.set_leaves_ns
                return reply({})
            case "guest-exec":
                if arguments["path"] not in self.programs:
                    return refusal("Failed to execute child process (No such file or directory)")
                self.offset_ns += int(arguments["arg"][0]) + self.step_leaves_ns
                return reply({"pid": 77})
            case "guest-exec-status":
                return reply({"exited": self.asked[-2] == "guest-exec-status", "exitcode": 0})
        raise AssertionError(request)


def reply(value: object) -> bytes:
    return json.dumps({"return": value}).encode() + b"\n"


def refusal(text: str) -> bytes:
    return json.dumps({"error": {"class": "GenericError", "desc": text}}).encode() + b"\n"


@pytest.fixture
def place() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="ga-", dir="/tmp"))
    yield folder / "ga"
    shutil.rmtree(folder)


@pytest.fixture
async def guest(place: Path) -> AsyncIterator[Guest]:
    found = Guest()
    async with serving(found.serve, place):
        yield found


@asynccontextmanager
async def serving(serve: Callable[..., Any], place: Path) -> AsyncIterator[None]:
    tasks: set[asyncio.Task[None]] = set()

    async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        await serve(reader, writer)

    server = await asyncio.start_unix_server(one, str(place))
    yield
    server.close()
    async with asyncio.timeout(patient(5)):  # they end when their client is gone
        await asyncio.gather(*tasks)


def by(timeout_s: float = 2.0) -> float:
    return asyncio.get_running_loop().time() + timeout_s


# -- the client -----------------------------------------------------------------------------------------------


async def test_left_over_replies_are_thrown_away(guest: Guest, place: Path) -> None:
    guest.first = reply(12345) + b'{"return": 1}{"ret\xff' + reply(1)
    async with guest_agent("vm", str(place), by()) as agent:
        await agent.ping()
    assert guest.asked == ["guest-sync-delimited", "guest-ping"]


async def test_a_synchronisation_that_was_lost_is_sent_again(guest: Guest, place: Path) -> None:
    guest.lost_synchronisations = 2
    async with guest_agent("vm", str(place), by()) as agent:
        await agent.ping()
    assert guest.asked == [*["guest-sync-delimited"] * 3, "guest-ping"]


async def test_there_is_no_socket(place: Path) -> None:
    with pytest.raises(AgentSilent, match=f"VM vm: cannot connect .*{place}: No such file"):
        async with guest_agent("vm", str(place), by()):
            pass


async def test_somebody_else_holds_the_socket(place: Path) -> None:
    async def hold(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async with serving(hold, place):
        begun = time.monotonic()
        with pytest.raises(AgentSilent, match="does nobody else hold its socket"):
            async with guest_agent("vm", str(place), by(0.6)):
                pass
        assert time.monotonic() - begun < patient(1.5)


@pytest.mark.parametrize(
    ("bent", "error", "said"),
    [
        (b"no json at all\n", AgentGarbage, "answers guest-get-time with b'no json"),
        (b'{"return": "noon"}\n', AgentGarbage, "says that the time is 'noon'"),
        (b'{"return": true}\n', AgentGarbage, "says that the time is True"),
        (b'{"return": -1}\n', AgentGarbage, "says that the time is -1"),
        (b'{"return": 99999999999999999999999}\n', AgentGarbage, "says that the time is 99999"),
        (b'{"yes": 1}\n', AgentGarbage, r"with \{'yes': 1\}"),
        (b"[1, 2]\n", AgentGarbage, r"with \[1, 2\]"),
        (b"x" * (1 << 20) + b"x" * 70000, AgentGarbage, "bytes without a newline"),
        (
            refusal("disabled by the administrator"),
            AgentRefused,
            "refuses guest-get-time: 'disabled by the admin",
        ),
        (b"", AgentSilent, "did not answer guest-get-time in time"),
        (b'{"return": 1', AgentSilent, "did not answer guest-get-time in time"),
    ],
)
async def test_nonsense_is_an_error_that_names_the_vm(
    guest: Guest, place: Path, bent: bytes, error: type[DriverError], said: str
) -> None:
    guest.bent["guest-get-time"] = lambda _: bent
    timeout_s = 0.5 if error is AgentSilent else patient(30)  # only silence is awaited to the end
    with pytest.raises(error, match=f"VM vm: .*{said}"):
        await set_clock("vm", partial(guest_agent, "vm", str(place)), timeout_s=timeout_s)


async def test_a_connection_that_ends_is_told(place: Path) -> None:
    async def leave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.close()

    async with serving(leave, place):
        with pytest.raises(AgentSilent, match="connection ended"):
            async with guest_agent("vm", str(place), by()):
                pass


async def test_a_program_is_waited_for(guest: Guest, place: Path) -> None:
    async with guest_agent("vm", str(place), by()) as agent:
        assert await agent.run(clock_setting.STEP_PROGRAM, "0") == 0
    assert guest.asked.count("guest-exec-status") == 2
    guest.bent["guest-exec-status"] = lambda _: reply({"exited": "perhaps"})
    with pytest.raises(AgentGarbage, match="guest-exec-status"):
        async with guest_agent("vm", str(place), by()) as agent:
            await agent.run(clock_setting.STEP_PROGRAM, "0")
    guest.bent["guest-exec"] = lambda _: reply("started")
    with pytest.raises(AgentGarbage, match="answers guest-exec with 'started'"):
        async with guest_agent("vm", str(place), by()) as agent:
            await agent.run(clock_setting.STEP_PROGRAM, "0")


# -- the clock ------------------------------------------------------------------------------------------------


async def test_a_far_clock_is_set_and_what_is_left_is_stepped_away(guest: Guest, place: Path) -> None:
    found = await set_clock("vm", partial(guest_agent, "vm", str(place)))
    assert found.before_s == pytest.approx(-5, abs=0.05)
    assert abs(found.after_s) <= 0.0003 + found.uncertainty_s
    assert [each for each in guest.asked if each in {"guest-set-time", "guest-exec"}] == [
        "guest-set-time",
        "guest-exec",
    ]


async def test_a_guest_without_the_program_is_set_again(guest: Guest, place: Path) -> None:
    guest.programs.clear()
    left = iter([-8 * MS, -100_000, 0, 0, 0])  # the first is beyond what a busy machine hides
    answer = guest.answer

    def set_time(request: dict[str, Any]) -> bytes:
        guest.set_leaves_ns = next(left)
        return answer(request)

    guest.bent["guest-set-time"] = set_time
    found = await set_clock("vm", partial(guest_agent, "vm", str(place)))
    assert guest.asked.count("guest-set-time") >= 2
    assert guest.asked.count("guest-exec") == 1, "asked for once"
    assert abs(found.after_s) <= 0.0003 + found.uncertainty_s


async def test_a_right_clock_is_left_alone(guest: Guest, place: Path) -> None:
    guest.offset_ns = 50_000
    found = await set_clock("vm", partial(guest_agent, "vm", str(place)))
    assert not {"guest-set-time", "guest-exec"} & set(guest.asked)
    assert found.before_s == found.after_s


async def test_a_complaint_of_hwclock_is_no_failure(guest: Guest, place: Path) -> None:
    answer = guest.answer

    def set_time(request: dict[str, Any]) -> bytes:
        answer(request)  # the clock is set, then hwclock fails
        return refusal("hwclock failed to set hardware clock to system time")

    guest.bent["guest-set-time"] = set_time
    assert abs((await set_clock("vm", partial(guest_agent, "vm", str(place)))).after_s) < 0.001


async def test_a_time_that_does_not_move_is_a_lie(guest: Guest, place: Path) -> None:
    fixed = time.time_ns()
    guest.bent["guest-get-time"] = lambda _: reply(fixed)
    with pytest.raises(DriverError, match="VM vm: the guest agent's time does not move"):
        await set_clock("vm", partial(guest_agent, "vm", str(place)))


async def test_times_that_contradict_each_other_are_a_lie(guest: Guest, place: Path) -> None:
    jumps = iter(range(1000))
    guest.bent["guest-get-time"] = lambda _: reply(time.time_ns() + next(jumps) % 2 * 50 * MS)
    with pytest.raises(DriverError, match="VM vm: the guest agent's times contradict each other by"):
        await set_clock("vm", partial(guest_agent, "vm", str(place)))


async def test_a_clock_that_cannot_be_set_is_told_with_the_agents_words(guest: Guest, place: Path) -> None:
    guest.bent["guest-set-time"] = lambda _: refusal("guest-set-time has been disabled")
    with pytest.raises(
        DriverError, match=r"VM vm: the guest's clock is still -5\.0\d\d s off: .*has been disabled"
    ):
        await set_clock("vm", partial(guest_agent, "vm", str(place)))
    guest.bent["guest-set-time"] = lambda _: reply({})
    with pytest.raises(DriverError, match=r"still -5\.0\d\d s off: guest-set-time had no effect"):
        await set_clock("vm", partial(guest_agent, "vm", str(place)))


def at(error_ns: int, round_trip_ns: int = 100_000, guest_ns: int = 0) -> GuestTimeSample:
    return GuestTimeSample(error_ns, round_trip_ns, guest_ns or 10 * S + error_ns)


def test_a_sample_is_the_middle_of_the_exchange() -> None:
    assert sample(1000, 5000, 1400) == GuestTimeSample(5000 - 1200, 400, 5000)


def test_the_shortest_exchange_counts() -> None:
    assert best("vm", [at(900, 2000), at(100, 400), at(500, 1000)]).error_ns == 100


def test_samples_may_contradict_each_other_a_little() -> None:
    best("vm", [at(0), at(2 * MS)])
    with pytest.raises(DriverError, match=r"contradict each other by 2\.9 ms"):
        best("vm", [at(0), at(3 * MS)])


@pytest.mark.parametrize(
    ("now", "actions", "may_step", "wanted"),
    [
        (at(-5 * S), 0, True, "set"),
        (at(-5 * MS), 0, True, "step"),
        (at(-5 * MS), 0, False, "set"),
        (at(5 * MS), 6, True, "done"),
        (at(-5 * S), 6, True, "done"),
        (at(250_000), 0, True, "done"),
        (at(5 * MS, round_trip_ns=12 * MS), 0, True, "done"),
    ],
)
def test_what_is_done_about_an_error(
    now: GuestTimeSample, actions: int, *, may_step: bool, wanted: str
) -> None:
    assert next_action(now, actions=actions, may_step=may_step) == wanted
