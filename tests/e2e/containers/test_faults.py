"""What happens to paused containers when their engine dies or hangs, when they end or are removed, and when others pause them."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from caesura.conformance.drivers import freeze_deadline
from caesura_host_updater.drivers.container.definition import (
    ContainerDefinition,
    ContainerOptions,
    ContainerVm,
)
from caesura_host_updater.drivers.container.driver import ContainerDriver
from caesura_host_updater.drivers.container.plugin import ContainerPlugin
from caesura_host_updater.drivers.port import DriverError, FreezeFailed
from caesura_testing.containers import Engine
from caesura_testing.patience import patient
from caesura_vmcontrol.resume_plans import cgroup_of
from caesura_vmcontrol.vm_control import condition, resume_vm


async def until(holds: Callable[[], bool], what: str, timeout_s: float = 20) -> None:
    """Wait for what nobody announces."""
    try:
        async with asyncio.timeout(patient(timeout_s)):
            while not holds():  # noqa: ASYNC110 - neither the kernel nor the engine calls us
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise AssertionError(f"not within {timeout_s:g} s: {what}") from None


def build(docker: Engine, folder: Path, name: str, **options: Any) -> ContainerDriver:
    """A driver of one VM, ``a``."""
    spec = ContainerVm(name="a", container=ContainerDefinition(name=name))
    return ContainerDriver((spec,), ContainerOptions(socket=str(docker.socket), **options), folder)


@pytest.fixture
async def one(
    docker: Engine, tmp_path: Path, run_container: Callable[..., str]
) -> AsyncIterator[tuple[ContainerDriver, str]]:
    """A driver, open, and the name of its container."""
    name = run_container()
    driver = build(docker, tmp_path, name)
    await driver.open()
    yield driver, name
    await driver.close(stop_vms=False)


@contextmanager
def hung(docker: Engine) -> Iterator[None]:
    """The engine does not answer in this block."""
    assert docker.daemon is not None
    os.kill(docker.daemon.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(docker.daemon.pid, signal.SIGCONT)


async def test_the_engine_and_the_kernel_agree_before_in_and_after_a_pause(one: Any, inspect: Any) -> None:
    driver, name = one
    plan = driver.resume_plan("a")
    assert (condition(plan), inspect(name, "{{.State.Paused}}")) == ("running", "false")
    await driver.freeze("a", freeze_deadline())
    assert (condition(plan), inspect(name, "{{.State.Paused}}")) == ("frozen", "true")
    assert await driver.resume("a", 5) == "running"
    assert (condition(plan), inspect(name, "{{.State.Paused}}")) == ("running", "false")
    assert driver.detail().startswith("Docker ")
    assert "live-restore" not in driver.detail()
    assert driver.capabilities("a").methods == ("live", "freeze")


async def test_an_engine_that_is_killed_in_the_pause(one: Any, docker: Engine, inspect: Any) -> None:
    """With live-restore its containers live on; the kernel is asked to resume them, and the next engine finds them running."""
    driver, name = one
    plan = driver.resume_plan("a")
    await driver.freeze("a", freeze_deadline())
    docker.kill()
    try:
        assert condition(plan) == "frozen"
        assert await driver.resume("a", 5) == "running"
        assert condition(plan) == "running"
        await until(lambda: "freeze" not in driver.capabilities("a").methods, "the engine is missed")
        assert "no container engine at" in driver.ping()
        with pytest.raises(FreezeFailed, match="no container engine at"):
            await driver.freeze("a", freeze_deadline())
        assert (await driver.read_states())["a"] == "running"
    finally:
        docker.start()
    await until(lambda: driver.ping() == "", "the engine is back")
    await driver.freeze("a", freeze_deadline())
    assert inspect(name, "{{.State.Paused}}") == "true"
    assert await driver.resume("a", 5) == "running"
    assert (condition(plan), inspect(name, "{{.State.Paused}}")) == ("running", "false")


async def test_an_engine_that_hangs_in_the_pause_holds_it_up_for_a_moment_only(
    one: Any, docker: Engine, inspect: Any
) -> None:
    driver, name = one
    plan = driver.resume_plan("a")
    await driver.freeze("a", freeze_deadline())
    with hung(docker):
        began = time.monotonic()
        resume_vm(plan)  # as the guard does
        assert condition(plan) == "running"
        assert time.monotonic() - began < patient(1.0)
    # The engine wakes up with an unpause in its socket, and may call the container paused from now on. The next pause puts
    # that right.
    await until(lambda: driver.ping() == "", "the engine answers")
    await driver.freeze("a", freeze_deadline())
    assert condition(plan) == "frozen"
    assert await driver.resume("a", 5) == "running"
    await until(lambda: inspect(name, "{{.State.Paused}}") == "false", "the engine calls it running")
    assert condition(plan) == "running"


async def test_a_container_that_was_resumed_beside_a_live_engine_can_be_paused_again(
    one: Any, inspect: Any
) -> None:
    driver, name = one
    plan = driver.resume_plan("a")
    await driver.freeze("a", freeze_deadline())
    resume_vm(cgroup_of(plan))
    assert (condition(plan), inspect(name, "{{.State.Paused}}")) == ("running", "true")
    assert (await driver.read_states())["a"] == "running", "the kernel's word counts"
    await driver.freeze("a", freeze_deadline())
    assert condition(plan) == "frozen"
    assert await driver.resume("a", 5) == "running"
    assert (condition(plan), inspect(name, "{{.State.Paused}}")) == ("running", "false")


async def test_an_engine_that_hangs_before_the_pause_never_pauses(one: Any, docker: Engine) -> None:
    driver, _ = one
    plan = driver.resume_plan("a")
    with hung(docker):
        with pytest.raises(FreezeFailed, match="does not answer within"):
            await driver.freeze("a", time.monotonic() + 0.5)
        assert await driver.resume("a", 5) == "running"
    await until(lambda: driver.ping() == "", "the engine answers")
    assert condition(plan) == "running"


async def test_a_pause_that_the_engine_carries_out_too_late_is_undone(
    one: Any, docker: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It hangs between its last answer and the pause: the request waits in its socket."""
    driver, _ = one
    plan = driver.resume_plan("a")
    call = driver._call

    def hangs_at_the_pause(method: str, container: str, what: str, timeout_s: float) -> object:
        if what == "/pause":
            assert docker.daemon is not None
            os.kill(docker.daemon.pid, signal.SIGSTOP)
        return call(method, container, what, timeout_s)

    monkeypatch.setattr(driver, "_call", hangs_at_the_pause)
    try:
        with pytest.raises(FreezeFailed, match="does not answer within"):
            await driver.freeze("a", time.monotonic() + 0.5)
        assert await driver.resume("a", 5) == "running"
    finally:
        assert docker.daemon is not None
        os.kill(docker.daemon.pid, signal.SIGCONT)
    # Whether it was paused at all is the engine's affair; in the end it runs, and stays so.
    await until(lambda: driver.ping() == "", "the engine answers")
    seen = []
    for _ in range(3):
        await driver._ask_engine()
        await driver._late.undo()
        seen.append(condition(plan))
    assert seen[-1] == "running", seen


async def test_a_container_that_is_removed_in_the_pause(one: Any, docker: Engine) -> None:
    driver, name = one
    plan = driver.resume_plan("a")
    await driver.freeze("a", freeze_deadline())
    docker.run("rm", "-f", name)
    async with asyncio.timeout(patient(20)):
        await driver.changed()
    assert condition(plan) == "gone"
    resume_vm(plan)  # as the guard does: nothing to do, and no error
    assert await driver.resume("a", 5) == "gone"
    await until(lambda: "there is no container" in driver.ping() or "has ended" in driver.ping(), "its end")
    with pytest.raises(DriverError):
        driver.resume_plan("a")


async def test_a_container_that_exits_and_is_started_again_by_somebody_else(
    docker: Engine, tmp_path: Path, run_container: Callable[..., str]
) -> None:
    name = run_container()
    driver = build(docker, tmp_path, name)
    await driver.open()
    try:
        docker.run("stop", "-t", "2", name)
        assert (await driver.read_states())["a"] == "stopped"
        await until(lambda: "exited with exit code" in driver.health_error("a"), "why")
        docker.run("start", name)
        await until(lambda: driver.ping() == "", "it is found")
        await driver.freeze("a", freeze_deadline())
        assert await driver.resume("a", 5) == "running"
    finally:
        await driver.close(stop_vms=False)


async def test_what_somebody_else_paused_is_left(one: Any, docker: Engine) -> None:
    driver, name = one
    docker.run("pause", name)
    assert (await driver.read_states())["a"] == "paused"
    with pytest.raises(FreezeFailed, match="paused by somebody else"):
        await driver.freeze("a", freeze_deadline())
    assert await driver.resume("a", 5) == "left"
    assert "docker unpause" in driver.why_left("a")
    assert condition(driver.resume_plan("a")) == "frozen"
    docker.run("unpause", name)
    assert (await driver.read_states())["a"] == "running"
    await driver.freeze("a", freeze_deadline())
    assert await driver.resume("a", 5) == "running"


async def test_no_engine_no_container(docker: Engine, tmp_path: Path) -> None:
    lost = build(docker, tmp_path, "no-such-container")
    await lost.open()
    assert lost.ping() == "not running: a (there is no container no-such-container)"
    await lost.close(stop_vms=False)
    elsewhere = ContainerDriver(
        (ContainerVm(name="a"),), ContainerOptions(socket=f"{tmp_path}/nobody.sock"), tmp_path
    )
    await elsewhere.open()
    assert "no container engine at" in elsewhere.ping()
    assert elsewhere.capabilities("a").missing["freeze"].startswith("no container engine at")
    await elsewhere.close(stop_vms=False)


async def test_labels_make_a_compose_project_an_inventory(
    docker: Engine, run_container: Callable[..., str]
) -> None:
    def labels(**values: str) -> list[str]:
        return [
            word for key, value in values.items() for word in ("--label", f"{key.replace('__', '.')}={value}")
        ]

    project = {"com__docker__compose__project": "shop"}
    web = run_container(
        *labels(caesura__set="web", caesura__update_domain="1", caesura__vm="web-1", **project)
    )
    bad = run_container(*labels(caesura__set="web", caesura__update_domain="99", **project))
    dotted = run_container(*labels(caesura__set="w.b", caesura__update_domain="0", **project))
    run_container(*labels(caesura__set="db", caesura__update_domain="0"))  # of no project
    run_container(*labels(**project))  # without a domain
    plugin = ContainerPlugin()
    options = ContainerOptions(socket=str(docker.socket), discover=True, project="shop")
    found, passed = plugin.discover(options, set())
    assert [(vm.name, vm.set, vm.update_domain, vm.container_name) for vm in found] == [
        ("web-1", "web", 1, web)
    ]
    assert set(passed) == {bad, dotted}
    assert plugin.discover(options, {"web-1"})[0] == ()
    everything = ContainerOptions(socket=str(docker.socket), discover=True)
    assert {vm.set for vm in plugin.discover(everything, set())[0]} == {"web", "db"}
    assert plugin.discover(ContainerOptions(socket=str(docker.socket)), set()) == ((), {})
    nobody = ContainerOptions(socket="/nowhere.sock", discover=True)
    assert "no container engine" in plugin.discover(nobody, set())[1]["/nowhere.sock"]
