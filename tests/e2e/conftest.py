"""A real Mosquitto, the installed commands as processes, and the kernel as the witness."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

import pytest

from caesura.bus.local_broker import LocalBroker
from caesura.contract import messages as m
from caesura.contract.parts import WholeRollout
from caesura.runtime.processes import freezers
from caesura_ctl.fleet_view import FleetView
from caesura_ctl.session import Session, connect, new_request_id
from caesura_ctl.settings import CtlSettings
from caesura_testing.broker import mosquitto, mosquitto_installed
from caesura_testing.sandbox import Sandbox, Vm

pytestmark = pytest.mark.e2e

ENDED = {"completed", "halted", "aborted"}
_LAST_WORD_S = 1.0  # s: from the end of a rollout to the last report of its hosts; some milliseconds at rest


class Stage:
    """A sandbox with a session on its bus, and the words that scenarios are written in."""

    def __init__(self, sandbox: Sandbox, session: Session) -> None:
        self.sandbox = sandbox
        self.session = session
        self.notice_s = 1.0

    @property
    def fleet_view(self) -> FleetView:
        return self.session.fleet_view

    async def up(self, *hosts: str) -> None:
        """Start the coordinator and these hosts, and wait until all of them, their VMs and agents are there."""
        await self.sandbox.start("coordinator", *hosts)
        await self.ready(*hosts)

    async def ready(self, *hosts: str) -> None:
        """Wait until these hosts have acknowledged the coordinator's epoch and all is well on them."""

        def well() -> bool:
            boss = self.fleet_view.coordinator
            if boss is None or not boss.online:
                return False
            for name in hosts:
                inventory = self.fleet_view.hosts.get(name)
                if inventory is None or not self.fleet_view.is_online(name) or inventory.guard != "ready":
                    return False
                if (inventory.epoch, inventory.coordinator) != (boss.epoch, boss.coordinator):
                    return False
                for vm in inventory.vms:
                    agent = self.fleet_view.agents.get(vm.vm)
                    if vm.state != "running" or (vm.agent and (agent is None or not agent.online)):
                        return False
            return True

        await self.sandbox.until(well, 20, f"{', '.join(hosts)} ready")
        self.sandbox.watch.learn()

    async def roll(
        self, update: str = "patch", *, selection: m.Selection | None = None, **policy: object
    ) -> str:
        """Start a rollout; its id."""
        answer = await self.request(update, selection=selection, **policy)
        assert answer.accepted, answer.reason
        return answer.rollout

    async def request(
        self, update: str, *, selection: m.Selection | None = None, **policy: object
    ) -> m.RequestAnswered:
        """Ask for a rollout; the answer."""
        return await self.session.ask(
            m.RolloutRequested(
                request=new_request_id(),
                update=update,
                selection=selection or m.Selection(),
                policy=self.policy(**policy),
                limits=m.Limits(again=True),  # a test rolls the same update as often as it likes
            )
        )

    def policy(self, **policy: object) -> m.Policy:
        values: dict[str, object] = {
            "notice_s": self.notice_s,
            "budget_s": 8.0,
            "verify_timeout_s": 15.0,
            **policy,
        }
        return m.Policy(**values)  # type: ignore[arg-type]

    def rollout(self, rollout: str) -> WholeRollout | None:
        return self.fleet_view.rollouts.get(rollout)

    async def wave(self, rollout: str, index: int, *statuses: str, timeout_s: float = 20.0) -> None:
        """Wait until a wave has one of these statuses."""

        def there() -> bool:
            state = self.rollout(rollout)
            return state is not None and state.waves[index].status in statuses

        await self.sandbox.until(there, timeout_s, f"wave {index} {'/'.join(statuses)}")

    async def ended(self, rollout: str, timeout_s: float = 45.0) -> WholeRollout:
        """Wait until the rollout completed, halted or was aborted."""

        def over() -> bool:
            state = self.rollout(rollout)
            return state is not None and state.status in ENDED

        await self.sandbox.until(over, timeout_s, f"the end of rollout {rollout}")
        with suppress(AssertionError):  # a host that is gone has no last word
            await self.sandbox.until(lambda: self._told(rollout), _LAST_WORD_S, "the reports")
        state = self.rollout(rollout)
        assert state is not None
        return state

    def _told(self, rollout: str) -> bool:
        """Whether all hosts' last words came: they are of other writers than the rollout's state, and may be read after it."""
        return all(each.status != "accepted" for each in self._reports(rollout))

    async def reports(self, rollout: str) -> list[m.OperationReported]:
        """The last word of each host of an ended rollout; there is at least one."""
        await self.sandbox.until(
            lambda: bool(self._reports(rollout)) and self._told(rollout),
            20,
            f"the reports of rollout {rollout}",
        )
        return self._reports(rollout)

    def _reports(self, rollout: str) -> list[m.OperationReported]:
        return [each for each in self.fleet_view.reports.values() if each.rollout == rollout]

    async def give_up(self, rollout: str) -> None:
        """Abort a halted rollout: until then it holds its sets."""
        answer = await self.session.ask(m.AbortRequested(request=new_request_id(), rollout=rollout))
        assert answer.accepted, answer.reason

        def aborted() -> bool:
            state = self.rollout(rollout)
            return state is not None and state.status == "aborted"

        await self.sandbox.until(aborted, 20, "the end of the abort")

    async def frozen(self, *vms: str, timeout_s: float = 15.0) -> None:
        """Wait until the kernel says that these VMs stand still, and the watch has it on record."""
        await self.sandbox.until(
            lambda: set(vms) <= self.sandbox.watch.standing(), timeout_s, f"{', '.join(vms)} frozen"
        )

    @asynccontextmanager
    async def held_in(self, state: str, rollout: str) -> AsyncIterator[None]:
        """Wait until the first wave of ``pair``'s rollout is in this state, where it stays while the block begins.

        A VM is verified within milliseconds, so its agent is silent then. ``pending`` lasts an instant: there is no
        waiting for it.

        Args:
            state: a wave's status, or ``frozen`` for VM web-1 standing still.
        """
        async with AsyncExitStack() as held:
            match state:
                case "pending":
                    pass
                case "frozen":
                    await self.frozen("web-1")
                case "verifying":
                    await self.frozen("web-1")
                    if not freezers(self.sandbox.agent_pid("web-1")):
                        pytest.skip("needs a cgroup freezer: a resume by SIGCONT would wake the agent")
                    held.enter_context(self.sandbox.silent_agent("web-1"))
                    await self.wave(rollout, 0, "verifying")
                case _:
                    await self.wave(rollout, 0, state)
            yield

    async def none_frozen(self, timeout_s: float = 10.0) -> None:
        """Wait until the kernel says that no VM stands still."""
        await self.sandbox.until(lambda: not self.sandbox.watch.frozen(), timeout_s, "no VM frozen")

    def assert_order(self) -> None:
        """Never were VMs of two domains of one set paused at once, says the kernel (I1)."""
        clashes = self.sandbox.watch.clashes(self.sandbox.places)
        assert not clashes, clashes

    def assert_one_end_each(self) -> None:
        """Every event reached exactly one end, its incarnations strictly rose, no document holds an event (I6, I7)."""
        for event_id, facts in self.fleet_view.events.items():
            ends = [each.status for each in facts if each.status in {"completed", "cancelled", "failed"}]
            assert len(ends) == 1, f"event {event_id} ended {ends}"
            incarnations = [each.incarnation for each in facts]
            assert incarnations == sorted(set(incarnations)), f"incarnations of {event_id}: {incarnations}"
        for document in self.fleet_view.documents.values():
            assert not document.events, f"{document.set} still shows {document.events}"


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[LocalBroker]:
    if not mosquitto_installed():
        pytest.skip("mosquitto is not installed (on Debian: apt-get install mosquitto)")
    async with mosquitto(tmp_path) as running:
        yield running


@pytest.fixture
async def stages(broker: LocalBroker) -> AsyncIterator[Callable[..., object]]:
    """Make a stage with hosts; ``await stages(host=[Vm, ...], ...)``. All is cleaned up in the end."""
    async with AsyncExitStack() as stack:

        async def make(*, freezer: str = "auto", up: bool = True, **hosts: list[Vm]) -> Stage:
            sandbox = await stack.enter_async_context(Sandbox(broker, freezer=freezer))
            session = await stack.enter_async_context(
                connect(CtlSettings(broker_url=broker.url, client="e2e"))
            )
            stage = Stage(sandbox, session)
            sandbox.coordinator()
            sandbox.update("patch", ["sleep", "1"])
            names = {name.replace("_", "-"): vms for name, vms in hosts.items()}
            for name, vms in names.items():
                sandbox.host(name, *vms)
            if up:
                await stage.up(*names)
            return stage

        yield make


@pytest.fixture
async def pair(stages: Callable[..., object]) -> Stage:
    """Two hosts, one VM each, one set, two domains; everything is up."""
    made = stages(
        host_1=[Vm(name="web-1", set="web", update_domain=0)],
        host_2=[Vm(name="web-2", set="web", update_domain=1)],
    )
    return await made  # type: ignore[misc, no-any-return]


@pytest.fixture
def stop_and_go() -> tuple[signal.Signals, signal.Signals]:
    return signal.SIGSTOP, signal.SIGCONT


@pytest.fixture
def loop_time() -> Callable[[], float]:
    return lambda: asyncio.get_running_loop().time()


@pytest.fixture
def new_stage() -> type[Stage]:
    return Stage
