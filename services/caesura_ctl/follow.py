"""Follow a rollout to its end: a live view on a terminal, a line per change otherwise, messages as JSON on request."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from caesura.contract.parts import WholeRollout
from caesura_ctl.durations import show_pause
from caesura_ctl.errors import NotCompleted
from caesura_ctl.fleet_view import FleetView
from caesura_ctl.options import Context, note
from caesura_ctl.outputs import failure_lines
from caesura_ctl.session import Session
from caesura_ctl.tables import live_view, next_commands, pauses_view

REFRESH_S = 0.25
ENDED = frozenset({"completed", "halted", "aborted"})
_LAST_FACTS_S = 2.0  # s: a rollout's end may overtake the hosts' last facts, but a late subscriber never receives the earlier ones


class Progress:
    """Prints each change of a rollout once as text: for logs and pipes."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def lines(self, fleet_view: FleetView, rollout: WholeRollout | None) -> list[str]:
        """The changes since the last call."""
        if rollout is None:
            return []
        facts = [
            f"rollout {rollout.rollout}: {rollout.status}"
            + (f": {_reason(rollout)}" if rollout.reason else "")
        ]
        if rollout.queued_behind:
            facts.append(f"rollout {rollout.rollout}: queued behind rollout {rollout.queued_behind}")
        facts += [
            f"wave {wave.wave + 1}: {wave.status}" + (f": {wave.reason}" if wave.reason else "")
            for wave in rollout.waves
            if wave.status != "pending"
        ]
        if lines := failure_lines(rollout):
            facts.append("\n".join(lines))
        facts += [
            f"{pause.vm}: paused {show_pause(pause.pause_s)} of {pause.budget_s:g}s, resumed by the {pause.resumed_by}"
            for pause in fleet_view.pauses_of(rollout.rollout)
        ]
        new = [each for each in facts if each not in self._said]
        self._said.update(new)
        return new


async def follow(session: Session, context: Context, rollout_id: str) -> WholeRollout:
    """Show a rollout until it completes, halts or is aborted; return its last state."""
    progress = Progress()
    loop = asyncio.get_running_loop()
    ended_at: float | None = None
    seen_under_way = False

    def current() -> WholeRollout | None:
        return session.fleet_view.rollouts.get(rollout_id)

    def view() -> RenderableType:
        size = context.console.size
        shown = live_view(
            session.fleet_view,
            datetime.now(UTC),
            rollout_id,
            lines=size.height - (not session.connection.up),
            width=size.width,
        )
        return (
            shown if session.connection.up else Group(shown, Text(session.connection.LOST, style="bold red"))
        )

    def say(news: list[str], lines: list[str]) -> None:
        for each in news:
            note(each, as_json=context.json)
        for line in lines:
            context.console.print(line, soft_wrap=True)

    async def wait(timeout_s: float) -> None:
        session.changed.clear()
        try:
            async with asyncio.timeout(timeout_s):
                await session.changed.wait()
        except TimeoutError:
            pass

    terminal = context.console.is_terminal and not context.json
    live = Live(console=context.console, auto_refresh=False) if terminal else None
    if live is not None:
        live.start()
    try:
        while True:
            state = current()
            news = session.connection.news()
            if live is not None:
                live.update(view(), refresh=True)
            else:
                say(news, [] if context.json else progress.lines(session.fleet_view, state))
            if state is not None and state.status in ENDED:
                ended_at = loop.time() if ended_at is None else ended_at
                if not seen_under_way:
                    return state  # it ended before we started: nothing more is published about it
                if not _reports_missing(session.fleet_view, state) or loop.time() >= ended_at + _LAST_FACTS_S:
                    return state
            seen_under_way = seen_under_way or state is not None
            await wait(REFRESH_S)
    finally:
        if live is not None:
            live.stop()


def _reason(state: WholeRollout) -> str:
    """Its reason, for a line that already names its status."""
    return state.reason.removeprefix(f"{state.status}: ")


def _reports_missing(fleet_view: FleetView, state: WholeRollout) -> bool:
    """A completed rollout has all its pauses, except for VMs that were not paused."""
    if state.status != "completed":
        return False
    expected = {vm for wave in state.waves for vm in wave.vms if wave.events}
    return not expected <= {pause.vm for pause in fleet_view.pauses_of(state.rollout)}


def conclude(session: Session, context: Context, state: WholeRollout) -> None:
    """Print the pauses per update domain.

    Raises:
        NotCompleted: with the reason, when the rollout halted or was aborted.
    """
    pauses = session.fleet_view.pauses_of(state.rollout)
    complete = session.fleet_view.observed_all(state)
    if context.json:
        from caesura_ctl.options import print_json  # noqa: PLC0415 - only for scripts

        print_json({"rollout": state, "pauses": pauses, "pauses_complete": complete})
    elif pauses:
        context.console.print(pauses_view(pauses, session.fleet_view.clocks))
        if not complete:
            context.console.print(
                "Only the pauses that this command received: it started after some of them, or lost the broker for a while."
            )
    if state.status != "completed":
        why = f"rollout {state.rollout} {state.status}: {_reason(state) or 'no reason given'}"
        following = [] if context.json else next_commands(state)
        raise NotCompleted("\n".join([why, *following]))
