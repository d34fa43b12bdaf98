"""Asks updates whether they are installed, by their own ``installed`` command, while no VM is paused.

A host that was rolled back or reinstalled must not be skipped because of what is remembered of it. Each command
has a time limit, and is killed when an operation begins.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Mapping
from contextlib import suppress

import msgspec

from caesura.runtime.logs import get_logger
from caesura_host_updater.inventory.updates import Catalogue, UpdateFile
from caesura_host_updater.update_process import UpdateNotStarted, UpdateProcess

_AGAIN_S = 60.0  # s: between two rounds, unless an event requires one
_LIMIT_S = 10.0  # s: for one command; what a package manager needs to look something up
_END_S = 1.0  # s: for a killed command to end

_log = get_logger("caesura.updates")


class InstalledProbe:
    """See the module.

    Args:
        host: this host's name.
        environ: what the commands inherit.
        catalogue: returns the current updates.
        busy: whether an operation is under way: then no update is asked.
        changed: called in the event loop when an answer changed.
        again_s: seconds between two rounds; limit_s: seconds for one command. Injected by tests only.
    """

    def __init__(
        self,
        host: str,
        environ: Mapping[str, str],
        *,
        catalogue: Callable[[], Catalogue],
        busy: Callable[[], bool],
        changed: Callable[[], None],
        again_s: float = _AGAIN_S,
        limit_s: float = _LIMIT_S,
    ) -> None:
        self._host = host
        self._environ = environ
        self._catalogue = catalogue
        self._busy = busy
        self._changed = changed
        self._again_s = again_s
        self._limit_s = limit_s
        self._wanted = asyncio.Event()
        self._round: asyncio.Task[None] | None = None
        self._answers: dict[str, tuple[UpdateFile, bool]] = {}

    @property
    def answers(self) -> dict[str, bool]:
        """Name to answer, of each update as it is now defined; an update that was not asked yet has none."""
        now = self._catalogue().updates
        return {name: answer for name, (asked, answer) in self._answers.items() if now.get(name) == asked}

    def ask(self) -> None:
        """Ask everything again, soon."""
        self._wanted.set()

    def interrupt(self) -> None:
        """An operation begins: a command under way is killed, and runs again when ``ask`` is called."""
        if self._round is not None:
            self._round.cancel()

    async def run(self) -> None:
        """Ask on request, and periodically. Never ends."""
        while True:
            self._wanted.clear()
            if not self._busy():
                self._round = asyncio.create_task(self._ask_all(), name="installed?")
                try:
                    await asyncio.wait({self._round})
                finally:
                    self._round.cancel()
                if not self._round.cancelled():
                    self._round.result()
                self._round = None
            with suppress(TimeoutError):
                async with asyncio.timeout(self._again_s):
                    await self._wanted.wait()

    async def _ask_all(self) -> None:
        defined = [each for each in self._catalogue().updates.values() if each.installed]
        self._answers = {
            each.name: self._answers[each.name] for each in defined if each.name in self._answers
        }
        for update in defined:
            answer = update, await self._ask(update)
            if self._answers.get(update.name) != answer:
                self._answers[update.name] = answer
                self._changed()

    async def _ask(self, update: UpdateFile) -> bool:
        """Whether it is installed; an update that does not answer in time is not, so that nothing is skipped by mistake."""
        variables = {"CAESURA_UPDATE": update.name, "CAESURA_HOST": self._host}
        question = msgspec.structs.replace(update, argv=update.installed)
        process = UpdateProcess(question, {**self._environ, **update.environ, **variables}, question=True)
        started = False
        try:
            async with asyncio.timeout(self._limit_s):
                await process.start()
                started = True
                code, _, _ = await process.wait()
        except UpdateNotStarted as error:
            _log.warning("update.not_asked", update=update.name, why=str(error))
            return False
        except TimeoutError:
            await _killed(process, started=started)
            _log.warning(
                "update.not_answered", update=update.name, why=f"no answer within {self._limit_s:g} s"
            )
            return False
        except asyncio.CancelledError:
            await _killed(process, started=started)
            raise
        finally:
            process.close()
        return code == 0


async def _killed(process: UpdateProcess, *, started: bool) -> None:
    process.end(signal.SIGKILL)
    if started:
        with suppress(TimeoutError):
            async with asyncio.timeout(_END_S):
                await process.wait()
