"""What the version before 0.1.0 wrote, as a broker may still retain it and a store hold it: it is read, or refused by name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from caesura.contract import messages as m
from caesura.contract.codec import ContractError, Malformed, UnknownTopic, decode
from caesura.contract.topics import CHANNELS

_FOLDER = Path(__file__).parent / "before-0.1.0"
_MOVED = {
    "caesura.freeze.commanded.v1": "caesura/v1/fleet/host/host-1/freeze",
    "caesura.abort.commanded.v1": "caesura/v1/fleet/host/host-1/abort",
}
"""Commands, under the names and topics of before: whoever sends them is refused (`caesura.lifecycle.command_compatibility`)."""
_TAKEN_APART = {"caesura.rollout.state.v1": "wave_count"}
"""Before 0.1.0 its waves were in it: a coordinator that has the rollout publishes it again at its start, taken apart."""
_CHANNELS = {channel.message.TYPE: channel for channel in CHANNELS}
_PATHS = sorted(_FOLDER.glob("*.json"))
_PARAMETERS = {"set": "web", "client": "ops", "ud": "0", "instance": "fleet"}


def _same(before: Any, now: Any) -> bool:
    """Whether all that was said is still there, as far as this version knows the member."""
    if isinstance(before, dict) and isinstance(now, dict):
        return all(_same(value, now[key]) for key, value in before.items() if key in now)
    if isinstance(before, list) and isinstance(now, list):
        return len(before) == len(now) and all(map(_same, before, now))
    return bool(before == now)


@pytest.mark.parametrize("path", _PATHS, ids=[path.stem for path in _PATHS])
def test_each_message_of_before_means_the_same_or_is_refused_by_name(path: Path) -> None:
    payload = path.read_bytes()
    event = json.loads(payload)
    if (topic := _MOVED.get(event["type"])) is not None:
        with pytest.raises(UnknownTopic, match=re.escape(topic)):
            decode(topic, payload)
        return
    channel = _CHANNELS[event["type"]]
    parameters = {
        name: str(event["data"].get("update_domain" if name == "ud" else name, _PARAMETERS.get(name)))
        for name in channel.parameters
    }
    topic = channel.topic(**parameters)
    if (lacking := _TAKEN_APART.get(event["type"])) is not None:
        with pytest.raises(Malformed, match=f"data of {re.escape(event['type'])}: .*{lacking}"):
            decode(topic, payload)
        return
    message = decode(topic, payload).message
    assert _same(event["data"], json.loads(msgspec.json.encode(message)))


def test_a_refused_plan_of_a_coordinator_of_before_can_be_read() -> None:
    """It has sentences only. The golden answer is of a plan that was accepted, so it does not show that."""
    path = _FOLDER / f"{m.RequestAnswered.TYPE}.json"
    event = json.loads(path.read_bytes())
    event["data"]["plan"] = {
        "update": "patch",
        "refusals": [{"subject": "host-1", "reason": "it is offline"}],
    }
    answer = decode("caesura/v1/fleet/ctl/ops/answer", json.dumps(event).encode()).message
    assert isinstance(answer, m.RequestAnswered)
    plan: Any = getattr(answer, "plan", None)
    if plan is not None:
        assert [(each.reason, each.code) for each in plan.refusals] == [("it is offline", "unexplained")]


def test_there_are_as_many_messages_of_before_as_there_were() -> None:
    assert len(_PATHS) == 28
    assert all(kind in {path.stem for path in _PATHS} for kind in _MOVED)
    assert issubclass(UnknownTopic, ContractError)
