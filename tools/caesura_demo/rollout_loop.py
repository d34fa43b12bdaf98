"""``python -m caesura_demo.rollout_loop``: one rollout after another, as a demonstration.

It uses the command ``caesura`` as a person would, and logs its observations and actions. A rollout that halts because
a component was unavailable is resumed a few times when that is available again; any other halt, and a rollout aborted by a person,
is left to a person.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from caesura.runtime.errors import CaesuraError
from caesura.runtime.logs import configure_logging, get_logger
from caesura.runtime.threads import in_thread
from caesura_demo.compose_fleet import UPDATES, compose_layout
from caesura_demo.resume_policy import (
    HaltSnapshot,
    NextAction,
    ResumeHistory,
    facts_from,
    next_action,
    update_for,
)

_POLICY = ("--notice", "10s", "--budget", "15s", "--soak", "2s")
"""Workloads approve within a second or two, so the notice is only for show; 15 s easily hold the longer update."""
_LOOK_AGAIN_S = 5.0
_PAUSE = re.compile(r"\d{1,5}(\.\d+)?")

_log = get_logger("caesura.rollouts")


class RolloutsError(CaesuraError):
    """It cannot continue; the text says what to correct."""

    exit_code = 2


class LoopSettings(msgspec.Struct, frozen=True):
    """The configuration from the environment."""

    on: bool
    pause_s: float
    """Seconds between the end of one rollout and the start of the next."""
    client: str


class CommandResult(msgspec.Struct, frozen=True):
    """The output of a command, and its exit code."""

    code: int
    document: dict[str, Any]
    words: str


def settings_from(environ: Mapping[str, str]) -> LoopSettings:
    """Read the three variables.

    Raises:
        RolloutsError: naming the variable and its allowed values.
    """
    wanted = environ.get("CAESURA_ROLLOUTS", "").strip().lower() or "on"
    if wanted not in {"on", "off"}:
        raise RolloutsError(f"CAESURA_ROLLOUTS={wanted}: it is on or off")
    pause = environ.get("CAESURA_ROLLOUT_PAUSE", "").strip() or "20"
    if not _PAUSE.fullmatch(pause):
        raise RolloutsError(f"CAESURA_ROLLOUT_PAUSE={pause}: it is a number of seconds, for example 20")
    return LoopSettings(wanted == "on", float(pause), environ.get("CAESURA_CTL_CLIENT", ""))


class Rollouts:
    """The loop. ``stop`` is called by another thread.

    Args:
        command: the operator's command.
        hosts: every expected host.
        look_again_s: seconds between two checks while waiting.
        clock: a monotonic clock, seconds.
    """

    def __init__(
        self,
        settings: LoopSettings,
        *,
        command: Sequence[str] = ("caesura",),
        hosts: Sequence[str] | None = None,
        look_again_s: float = _LOOK_AGAIN_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._hosts = compose_layout().hosts if hosts is None else tuple(hosts)
        self._clock = clock
        self._command = tuple(command)
        self._look_again_s = look_again_s
        self._stopping = threading.Event()
        self._child: subprocess.Popen[str] | None = None
        self._found: str | None = None
        self._wave = ("", 0)
        """The rollout and the number of its completed waves to which ``_resumed`` refers."""
        self._resumed = 0
        self._halted_at: float | None = None
        self._count = 0
        self._said: NextAction | None = None

    def stop(self) -> None:
        """End soon; the current rollout continues without us."""
        self._stopping.set()
        if self._child is not None:
            self._child.terminate()

    def run(self) -> None:
        """Run until stopped.

        Raises:
            RolloutsError: the command cannot be used as it is configured.
        """
        if not self._settings.on:
            _log.info(
                "rollouts.off", how="docker compose run --rm caesura roll hypervisor-patch --all --notice 10s"
            )
            self._stopping.wait()
            return
        while not self._stopping.is_set():
            self._stopping.wait(self.once())

    def once(self) -> float:
        """Check the state, take one action; returns the seconds until the next check."""
        seen = self._ask("status")
        if seen.code != 0:
            _log.warning("rollouts.cannot_look", code=seen.code, why=seen.words)
            return self._look_again_s
        facts = facts_from(seen.document)
        step = next_action(facts, client=self._settings.client, hosts=self._hosts, past=self._past(facts))
        if step.what in {"wait", "leave"}:
            self._say(step)
            return self._look_again_s
        self._said = None
        if step.what == "roll":
            return self._roll()
        if step.what == "resume":
            _log.warning("rollout.resuming", rollout=step.rollout, why=step.why)
        answer = self._ask(step.what, step.rollout)
        if step.what == "resume" and _followed(answer):
            self._resumed += 1
            self._halted_at = None  # the next halt is a different one
        return self._concluded(answer)

    def _past(self, facts: HaltSnapshot) -> ResumeHistory:
        """Our earlier actions on this rollout, updated."""
        if self._found is None:
            self._found = facts.rollout if facts.status == "aborted" else ""
        if self._wave != (facts.rollout, facts.waves_done):
            self._wave = (facts.rollout, facts.waves_done)
            self._resumed, self._halted_at = 0, None
        if facts.status != "halted":
            self._halted_at = None
        elif self._halted_at is None:
            self._halted_at = self._clock()
        halted_s = 0.0 if self._halted_at is None else self._clock() - self._halted_at
        return ResumeHistory(resumed=self._resumed, halted_s=halted_s, found=self._found)

    def _roll(self) -> float:
        update = update_for(tuple(UPDATES), self._count)
        self._count += 1
        _log.info("rollout.starting", update=update)
        return self._concluded(self._ask("roll", update, "--all", "--again", *_POLICY))

    def _concluded(self, answer: CommandResult) -> float:
        """Log how it ended. An end is followed by the pause; anything else is checked soon."""
        if _followed(answer):
            state = answer.document["rollout"]
            longest = max((each["pause_s"] for each in answer.document.get("pauses", [])), default=0.0)
            _log.info(
                "rollout.ended",
                rollout=state["rollout"],
                update=state["update"],
                status=state["status"],
                why=state.get("reason", ""),
                pauses=len(answer.document.get("pauses", [])),
                longest_s=round(longest, 3),
            )
            return self._look_again_s if state["status"] == "halted" else self._settings.pause_s
        if not self._stopping.is_set():
            _log.warning("rollouts.not_done", code=answer.code, why=answer.words)
        return self._look_again_s

    def _say(self, step: NextAction) -> None:
        """Log once for each cause of waiting."""
        if step == self._said:
            return
        self._said = step
        if step.what == "leave":
            _log.error("rollout.left_to_you", rollout=step.rollout, why=step.why, how=step.how)
        else:
            _log.info("rollouts.waiting", why=step.why)

    def _ask(self, *words: str) -> CommandResult:
        """Run one command to its end.

        Raises:
            RolloutsError: it refuses its configuration.
        """
        self._child = subprocess.Popen(
            [*self._command, *words, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        if self._stopping.is_set():
            self._child.terminate()  # a signal arrived during the start
        out, err = self._child.communicate()
        code = self._child.returncode
        self._child = None
        answer = CommandResult(code, _document(out), _reason(err) or out.strip()[-500:])
        if code == RolloutsError.exit_code:
            raise RolloutsError(f"caesura {' '.join(words)}: {answer.words}")
        return answer


def _followed(answer: CommandResult) -> bool:
    """Whether the command was accepted and followed the rollout to its end: it prints the state, completed (0) or not (1)."""
    return answer.code in {0, 1} and isinstance(answer.document.get("rollout"), dict)


def _document(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _reason(text: str) -> str:
    lines = text.strip().splitlines()
    if not lines:
        return ""
    document = _document(lines[-1])
    return str(document.get("reason", "")) or lines[-1]


async def _run_until_stopped(rollouts: Rollouts) -> None:
    """Run in a thread: otherwise a signal just before a blocking call would only be noticed when that returns.

    Raises:
        RolloutsError: as ``Rollouts.run``.
    """
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, rollouts.stop)
    await in_thread("roll updates out", rollouts.run)


def main() -> int:
    """0: stopped by a signal; 2: the configuration is wrong."""
    configure_logging("rollout")
    try:
        asyncio.run(_run_until_stopped(Rollouts(settings_from(os.environ))))
    except CaesuraError as error:
        _log.error("rollouts.failed", why=str(error))
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
