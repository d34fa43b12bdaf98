"""A container of Docker or Podman that runs already, as a target: paused through its engine, with the kernel as witness."""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

from caesura.runtime.logs import get_logger
from caesura.runtime.threads import in_thread
from caesura_host_updater.drivers.container.cgroup import NoFreezer
from caesura_host_updater.drivers.container.definition import NO_LIVE_RESTORE, engine_facts
from caesura_host_updater.drivers.container.pausing import ASK_S, engine_call, plan_of_container
from caesura_host_updater.spawn import ExitWatch
from caesura_rehearse.targets.container_lookup import (
    ContainerFacts,
    ListedContainer,
    NoContainer,
    container_facts,
    container_name,
    container_of_service,
    listed,
    no_such_container,
    why_not_paused,
)
from caesura_rehearse.targets.pause import pids_of
from caesura_rehearse.targets.target import NoTarget
from caesura_vmcontrol import container_engine
from caesura_vmcontrol.container_engine import EngineGone, EnginePlan, EngineRefused
from caesura_vmcontrol.procfs import alive

_START_S = 20.0  # s: for the engine to start a container; some 300 ms are usual
_STOP_MARGIN_S = 10.0  # s: for the engine to answer that it has stopped a container, after its grace
_NOTICED_S = 2.0  # s: for the engine to notice that a container has ended; milliseconds are usual
_LOOK_S = 0.02  # s: between two looks at that

_log = get_logger("caesura.rehearse")


def engine_socket(given: str, runtime_dir: str) -> str:
    """The path of the engine's socket. Blocking.

    Args:
        given: the option or ``DOCKER_HOST``: a path, or ``unix://PATH``; empty: the first of the usual ones that there is.
        runtime_dir: ``XDG_RUNTIME_DIR``: engines of ordinary users have theirs there.

    Raises:
        NoContainer: it is not a socket of this machine, or there is none.
    """
    if given:
        path = given.removeprefix("unix://")
        if not path.startswith("/"):
            raise NoContainer(
                f"the engine {given} cannot be used: give the path of a unix socket (--engine /run/podman/podman.sock), over which the pause "
                "guard can resume the container, too"
            )
        return path
    usual = ["/var/run/docker.sock", "/run/podman/podman.sock"]
    if runtime_dir:
        usual += [f"{runtime_dir}/docker.sock", f"{runtime_dir}/podman/podman.sock"]
    for path in usual:
        if Path(path).is_socket():
            return path
    raise NoContainer(
        f"no container engine: there is none of {', '.join(usual)}. Start one, or name its socket (--engine, or DOCKER_HOST)"
    )


class RunningContainer:
    """A container that somebody else started. It is resumed, and ended only by an event that does; what a Reboot ended is started again.

    Args:
        vm: its VM's name.
        socket: of its engine.
        facts: of the container.
        notes: what should be known before it is paused, for people.
    """

    def __init__(self, vm: str, socket: str, facts: ContainerFacts, notes: tuple[str, ...] = ()) -> None:
        self.vm = vm
        self.what = f"container {facts.name}"
        self.facts = facts
        self.notes = notes
        self.restart_obstacle = "it is removed when it ends (--rm)" if facts.removed_at_end else ""
        self.ended = asyncio.Event()
        self.exit_code: int | None = None
        self.on_exit: Callable[[], None] = lambda: None
        self.entered: Callable[[int], Awaitable[None]] | None = None
        """Called with its first process at each start, before ``start`` returns."""
        self._socket = socket
        self._container = facts.state.container
        self._call = engine_call(socket)
        self._plan: EnginePlan | None = None
        self._watch: ExitWatch | None = None
        self._ending: asyncio.Task[None] | None = None
        self._stopping: asyncio.Task[None] | None = None
        self._hurry = asyncio.Event()
        self._comes_back = False
        """Whether it was stopped to be started again."""

    async def start(self) -> None:
        """Take it; start it if it was ended by a Reboot. Raises NoTarget."""
        if self._comes_back:
            await self._engine("POST", "/start", _START_S)
            self._comes_back = False
        try:
            facts = container_facts(await self._engine("GET", "/json", ASK_S))
            if why := why_not_paused(facts):
                raise NoTarget(why)
            plan = await in_thread(self.what, lambda: self._look(facts))
            self._watch = ExitWatch(plan.pid, self._process_ended, reap=False)
        except ProcessLookupError as error:
            raise NoTarget(f"{self.what} has just ended") from error
        except (NoFreezer, OSError, ValueError) as error:
            raise NoTarget(f"{self.what} cannot be paused: {error}") from error
        self._plan, self.exit_code = plan, None
        self.ended.clear()
        if self.entered is not None:
            await self.entered(plan.pid)

    def _look(self, facts: ContainerFacts) -> EnginePlan:
        plan = plan_of_container(self.vm, self._socket, facts.state)
        if plan is None:
            raise ProcessLookupError
        if os.getpid() in pids_of(plan):
            raise NoTarget(f"this command runs in {self.what}: it would pause itself")
        return plan

    async def _engine(self, method: str, what: str, timeout_s: float) -> object:
        """Ask the engine about the container. Raises NoTarget."""
        try:
            return await in_thread(self.what, lambda: self._call(method, self._container, what, timeout_s))
        except OSError as error:
            raise NoTarget(f"{self.what}: {error}") from error

    def plan(self) -> EnginePlan:
        """As in ``Target``."""
        plan = self._plan
        if plan is None or self.ended.is_set() or not alive(plan.pid, plan.start_ticks):
            raise NoTarget(f"{self.what} does not run any more")
        return plan

    def _process_ended(self) -> None:
        self._ending = asyncio.create_task(self._learn_end(), name=f"end of {self.what}")

    async def _learn_end(self) -> None:
        """Ask the engine for the exit code, which notices an end a moment later than we do."""
        try:
            async with asyncio.timeout(_NOTICED_S):
                while (found := container_facts(await self._engine("GET", "/json", ASK_S)).state).running:
                    # Started again by its restart policy: its last exit code is gone.
                    if self._plan is None or found.pid not in (0, self._plan.pid):
                        break
                    await asyncio.sleep(_LOOK_S)
                else:
                    self.exit_code = found.exit_code
        except (NoTarget, ValueError, TimeoutError) as error:  # removed at its end, or the engine is away
            _log.debug("container.exit_code_unknown", why=str(error))
        self.ended.set()
        self.on_exit()

    async def end(self, grace_s: float, *, again: bool = False) -> None:
        """As in ``Target``, by the engine."""
        if self.ended.is_set():
            return
        self._comes_back = again
        if self._stopping is None or self._stopping.done():
            self._stopping = asyncio.create_task(self._stop(grace_s), name=f"stop {self.what}")
        await asyncio.shield(self._stopping)

    async def _stop(self, grace_s: float) -> None:
        grace = math.ceil(grace_s)
        stopped = asyncio.create_task(self._engine("POST", f"/stop?t={grace}", grace + _STOP_MARGIN_S))
        hurried = asyncio.create_task(self._hurry.wait())
        try:
            await asyncio.wait({stopped, hurried}, return_when=asyncio.FIRST_COMPLETED)
            if not stopped.done():
                with suppress(NoTarget):  # it has just ended
                    await self._engine("POST", "/kill", _STOP_MARGIN_S)
            await stopped
            await self.ended.wait()
        finally:
            hurried.cancel()

    def hurry(self) -> None:
        """As in ``Target``, for a stop that is under way."""
        self._hurry.set()

    async def close(self, grace_s: float) -> None:  # noqa: ARG002 - as in the protocol
        """Stop watching it; what was being rebooted is started again."""
        if self._stopping is not None:
            await asyncio.gather(self._stopping, return_exceptions=True)
        if self._comes_back:
            try:
                await self._engine("POST", "/start", _START_S)
            except NoTarget as error:
                _log.error("container.not_started", why=str(error))
        if self._watch is not None:
            self._watch.close()
        if self._ending is not None:
            self._ending.cancel()


async def find_container(
    vm: str, engine: str, *, container: str = "", service: str = "", folder: Path
) -> RunningContainer:
    """The container that is meant, looked at and not yet watched.

    Args:
        vm: its VM's name.
        engine: the option ``--engine``; empty: the usual sockets.
        container: its name or id; or else
        service: its Compose service.
        folder: the present one.

    Raises:
        NoContainer: there is none such, or it cannot be paused.
    """

    def find() -> RunningContainer:
        socket = engine_socket(engine, os.environ.get("XDG_RUNTIME_DIR", ""))
        try:
            name = (
                container_name(container)
                if container
                else container_of_service(service, _list(socket), str(folder))
            )
            try:
                facts = container_facts(engine_call(socket)("GET", quote(name), "/json", ASK_S))
            except EngineRefused as error:
                if error.status != 404:
                    raise
                raise no_such_container(name, _list(socket)) from error
            if why := why_not_paused(facts):
                raise NoContainer(why)
            return RunningContainer(vm, socket, facts, _notes(socket, facts))
        except EngineGone as error:
            raise NoContainer(f"{error}. Start it, or name its socket (--engine, or DOCKER_HOST)") from error
        except PermissionError as error:
            raise NoContainer(
                f"this user may not use the engine at {socket}: it needs root, or the group of the socket"
            ) from error
        except (OSError, ValueError) as error:
            raise NoContainer(str(error)) from error

    return await in_thread("find the container", find)


def _list(socket: str) -> tuple[ListedContainer, ...]:
    return listed(container_engine.call(socket, "GET", "/containers/json?all=1", ASK_S))


def _notes(socket: str, facts: ContainerFacts) -> tuple[str, ...]:
    """What makes a pause of the container riskier than it must be."""
    notes = []
    version = container_engine.call(socket, "GET", "/version", ASK_S)
    if not engine_facts(version, container_engine.call(socket, "GET", "/info", ASK_S)).survives:
        notes.append(NO_LIVE_RESTORE)
    try:
        plan = plan_of_container("", socket, facts.state)
    except (NoFreezer, OSError):
        return tuple(notes)  # said when it is taken
    if plan is not None and not os.access(plan.control, os.W_OK):
        notes.append(
            "this user cannot write the freezer of its cgroup: if the engine dies in the pause, the container stays paused until it is back"
        )
    return tuple(notes)
