"""A rollout that waits for another one: the metrics and the live page tell of the one that holds the set."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from caesura.contract.parts import WholeRollout
from caesura_metrics_exporter.live.page_json import rollout_view
from caesura_metrics_exporter.rollout_index import RolloutIndex
from caesura_testing.rollouts import wave_state, whole_rollout

AT = datetime(2026, 4, 20, 22, 26, 58, tzinfo=UTC)


def _rollout(name: str, minute: int, **members: object) -> WholeRollout:
    waves = (wave_state(wave=0, status="scheduled", domains={"web": 0}, vms=("w1",), hosts=("h1",)),)
    return whole_rollout(name, waves, created_at=AT + timedelta(minutes=minute), **members)


def test_the_holder_of_a_set_is_never_one_that_waits_for_it() -> None:
    index = RolloutIndex()
    index.take(_rollout("front", 0))
    index.take(_rollout("next", 1, queued_behind="front"))
    holder, shown = index.holder("web"), index.of_set("web")
    assert holder is not None
    assert shown is not None
    assert (holder.rollout, shown.rollout) == ("front", "front")
    index.take(_rollout("front", 0, status="completed", ended_at=AT))
    assert index.holder("web") is None, "not its turn yet"
    index.take(_rollout("next", 1))
    holder = index.holder("web")
    assert holder is not None
    assert holder.rollout == "next"


def test_the_live_page_says_whom_a_rollout_waits_for_while_it_does() -> None:
    def none_paused(_: object) -> int:
        return 0

    assert rollout_view(_rollout("next", 1, queued_behind="front"), none_paused).queued_behind == "front"
    aborted = _rollout("next", 1, queued_behind="front", status="aborted")
    assert rollout_view(aborted, none_paused).queued_behind == ""


def test_events_of_a_wave_are_counted_as_a_coordinator_of_either_version_says() -> None:
    def none_paused(_: object) -> int:
        return 0

    old = wave_state(wave=0, status="scheduled", events={"web": "A", "db": "B"}, approved=("web",))
    new = wave_state(wave=0, status="scheduled", events={"web": "A"}, event_count=3, approved_count=2)
    counts = [
        (wave.events, wave.approved)
        for each in (old, new)
        for wave in rollout_view(whole_rollout("r", (each,)), none_paused).waves
    ]
    assert counts == [(2, 1), (3, 2)]
