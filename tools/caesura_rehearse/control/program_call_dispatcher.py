"""The calls that start and watch programs beside those of ``CallDispatcher``: for a test suite that brings its own."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from caesura.runtime.threads import in_thread
from caesura_host_updater.drivers.process.freezers import Freezer, choose_freezer
from caesura_rehearse.control.call_dispatcher import BadCall, CallDispatcher, StepMissed
from caesura_rehearse.durations import seconds_in
from caesura_rehearse.network.ports import ports_for
from caesura_rehearse.run_folder import cgroup_of
from caesura_rehearse.simulation.fleet_simulation import FleetSimulation
from caesura_rehearse.simulation.members import MOST_VMS, members_of
from caesura_rehearse.simulation.placeholders import arguments_of
from caesura_rehearse.simulation.slots import Slot
from caesura_rehearse.targets.target import Program, program_environ

SET = "app"
VM = "app-1"
_LOOK_S = 0.02  # s: between two looks at a program's output: nobody notifies us


class RunArguments(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of ``run``."""

    argv: Annotated[tuple[str, ...], Meta(min_length=1)]
    environ: dict[str, str]
    cwd: str
    vms: Annotated[int, Meta(ge=1, le=MOST_VMS)] = 1


class OutputArguments(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of ``wait_output``."""

    text: str
    timeout: float | str = 30.0
    vm: str = VM


class ExitArguments(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of ``wait_exit``."""

    timeout: float | str = 30.0
    vm: str = VM


class VmArguments(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of ``stop``."""

    vm: str = VM


class ProgramCallDispatcher(CallDispatcher):
    """The calls that start and watch programs, too.

    Args:
        simulation: with the first VM already added; ``run`` adds the others.
        folder: for the output of its programs.
        freezer: how they are paused.
    """

    def __init__(self, simulation: FleetSimulation, folder: Path, freezer: Freezer) -> None:
        super().__init__(simulation)
        self._folder = folder
        self._freezer = freezer

    async def _call(self, name: str, arguments: Mapping[str, Any]) -> Any:
        match name:
            case "run":
                return await self._run(msgspec.convert(arguments, RunArguments))
            case "wait_output":
                return await self._wait_output(msgspec.convert(arguments, OutputArguments))
            case "wait_exit":
                return await self._wait_exit(msgspec.convert(arguments, ExitArguments))
            case "stop":
                return await self._program(msgspec.convert(arguments, VmArguments).vm).end(10.0)
        return await super()._call(name, arguments)

    async def _run(self, arguments: RunArguments) -> list[dict[str, Any]]:
        members = members_of(SET, arguments.vms)
        ports = ports_for([each.vm for each in members])
        words = [
            arguments_of(arguments.argv, member, port, strict=len(members) > 1)
            for member, port in zip(members, ports, strict=True)
        ]
        await self._end_all()
        started = []
        for member, port, argv in zip(members, ports, words, strict=True):
            slot = self._simulation.slots.get(member.vm) or await self._simulation.add_vm(
                member.vm, member.set, member.update_domain
            )
            slot.port = port
            started.append(await self._start(slot, argv, arguments))
        return started

    async def _end_all(self) -> None:
        for slot in self._simulation.slots.values():
            if slot.target is not None:
                slot.ending = True
                await slot.target.close(0.0)
            slot.target, slot.exited, slot.ending = None, None, False

    async def _start(self, slot: Slot, argv: Sequence[str], arguments: RunArguments) -> dict[str, Any]:
        output = self._output_of(slot.vm)
        output.unlink(missing_ok=True)
        environ = program_environ(slot.vm, slot.set, slot.url, base=arguments.environ)
        program = Program(
            slot.vm,
            argv,
            {**environ, **slot.variables},
            self._folder,
            self._freezer,
            cwd=Path(arguments.cwd),
            output=output,
        )
        await self._simulation.attach(slot, program)
        return {"vm": slot.vm, "pid": program.pid, "output": str(output), "port": slot.port, "url": slot.url}

    def _output_of(self, vm: str) -> Path:
        return self._folder / f"{vm}.output"

    def _program(self, vm: str) -> Program:
        slot = self._simulation.slots.get(vm)
        if slot is None or not isinstance(slot.target, Program):
            raise BadCall("no program was started: call run first")
        return slot.target

    async def _wait_output(self, arguments: OutputArguments) -> None:
        path, wanted = self._output_of(arguments.vm), arguments.text.encode()
        program = self._program(arguments.vm)
        try:
            async with asyncio.timeout(seconds_in(arguments.timeout)):
                while wanted not in await in_thread("output", path.read_bytes):
                    if program.ended.is_set():
                        raise StepMissed(f"{program.what} ended and has not written {arguments.text!r}")
                    await asyncio.sleep(_LOOK_S)
        except TimeoutError:
            raise StepMissed(f"{program.what} has not written {arguments.text!r} in time") from None

    async def _wait_exit(self, arguments: ExitArguments) -> int | None:
        program, timeout_s = self._program(arguments.vm), seconds_in(arguments.timeout)
        if not await self._simulation.until(program.ended.is_set, timeout_s):
            raise StepMissed(f"{program.what} did not end within {timeout_s:g} s")
        return program.exit_code


async def best_freezer() -> Freezer:
    """How programs are paused here."""
    freezer, _ = await in_thread("freezer", lambda: choose_freezer("auto", cgroup_of(os.getpid())))
    return freezer
