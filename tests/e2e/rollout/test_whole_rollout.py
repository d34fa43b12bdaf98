"""A rollout from request to end, watched by the kernel."""

from __future__ import annotations

from typing import Any

from caesura_testing.patience import patient


async def test_domain_by_domain_to_the_end(pair: Any) -> None:
    state = await pair.ended(await pair.roll())
    assert state.status == "completed", state.reason
    watch = pair.sandbox.watch
    assert [each.vm for each in watch.pauses] == ["web-1", "web-2"]
    assert all(1.0 <= each.ended - each.begun <= patient(3.0) for each in watch.pauses)
    pair.assert_order()
    pauses = {each.vm: each for each in pair.fleet_view.pauses.values()}
    assert set(pauses) == {"web-1", "web-2"}
    for seen in watch.pauses:
        # What the host measured is what the kernel showed, give or take the watch's own period.
        assert abs(pauses[seen.vm].pause_s - (seen.ended - seen.begun)) < patient(0.15)
        assert pauses[seen.vm].memory.proof == "digest"
        assert pauses[seen.vm].memory.ok
    await pair.sandbox.until(
        lambda: not any(document.events for document in pair.fleet_view.documents.values()),
        5,
        "documents empty",
    )
    pair.assert_one_end_each()
    clocks = [each for each in pair.fleet_view.clocks.values() if each.operation]
    assert all(each.synced and abs(each.error_after_s or 0) < 0.1 for each in clocks)
    assert all(-3 < (each.error_before_s or 0) < -0.8 for each in clocks), "guest clocks stood still"
