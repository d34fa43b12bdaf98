"""Rollouts as readers have them, made up for tests, and the messages that they come in."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from msgspec.structs import replace

from caesura.bus.messaging import MessageClient
from caesura.contract import messages as m
from caesura.contract.envelope import Message
from caesura.contract.parts import WholeRollout, etag_of

_AT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def wave_state(**members: Any) -> m.WaveState:
    """A wave's state; ``whole_rollout`` gives it the name of its rollout and its etag."""
    facts: dict[str, Any] = {"status": "pending", "domains": {}, "hosts": (), "vms": ()}
    return m.WaveState(**(facts | {"rollout": "r", "etag": "0" * 12} | members))


def whole_rollout(rollout: str = "r", waves: Iterable[m.WaveState] = (), **members: Any) -> WholeRollout:
    """A running rollout with these waves; ``members`` are those of its state that matter."""
    named = [replace(each, rollout=rollout) for each in waves]
    own = tuple(replace(each, etag=etag_of(replace(each, etag="0" * 12))) for each in named)
    current = next((each for each in own if each.status != "completed"), None)
    facts: dict[str, Any] = {
        "update": "u",
        "status": "running",
        "policy": m.Policy(),
        "sets": tuple(dict.fromkeys(set_name for each in own for set_name in each.domains)),
        "created_at": _AT,
    }
    return WholeRollout(
        rollout=rollout,
        waves=own,
        wave_count=len(own),
        waves_completed=sum(each.status == "completed" for each in own),
        current_wave=current.wave if current is not None else None,
        current_status=current.status if current is not None else None,
        wave_etags=tuple(each.etag for each in own),
        **(facts | members),
    )


def changed(known: WholeRollout, **members: Any) -> WholeRollout:
    """The rollout with other members, its waves among them."""
    facts = {name: getattr(known, name) for name in ("update", "status", "policy", "sets", "created_at")}
    facts |= {
        name: getattr(known, name)
        for name in ("hold_s", "reason", "codes", "estimate_s", "requested_by", "ended_at")
    }
    waves = members.pop("waves", known.waves)
    return whole_rollout(members.pop("rollout", known.rollout), waves, **(facts | members))


def sent(whole: WholeRollout) -> list[tuple[Message, dict[str, str | int]]]:
    """What a coordinator publishes of it, in order: message and topic parameters."""
    head = m.RolloutState(**{name: getattr(whole, name) for name in m.RolloutState.__struct_fields__})
    messages: list[tuple[Message, dict[str, str | int]]] = [
        (each, {"rollout": each.rollout, "wave": each.wave}) for each in whole.waves
    ]
    return [*messages, (head, {"rollout": whole.rollout})]


async def announce(post: MessageClient, whole: WholeRollout) -> None:
    """Publish it as a coordinator does."""
    for message, parameters in sent(whole):
        await post.send(message, **parameters)  # type: ignore[arg-type]
