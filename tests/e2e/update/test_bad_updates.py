"""An update that fails, hangs, or ignores SIGTERM: the right report, a halt, all VMs running."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from caesura_testing.sandbox import Vm

# Updates take at least 0.3 s: a shorter pause may slip between two looks of the kernel watch.
_STUBBORN = [
    "python3",
    "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)",
]


@pytest.mark.parametrize(
    ("argv", "values", "outcome", "words"),
    [
        (["sh", "-c", "sleep 0.3; echo no space left >&2; exit 3"], {}, "failed", "exit code 3"),
        (["sleep", "60"], {"timeout_s": 1.5}, "timeout", "1.5 s"),
        (_STUBBORN, {"timeout_s": 1.5}, "timeout", "1.5 s"),
        (["sleep", "60"], {"timeout_s": 60.0}, "timeout", "budget"),
        (["sh", "-c", "sleep 0.3; kill -9 $$"], {}, "failed", "signal"),
    ],
    ids=["fails", "hangs", "ignores-sigterm", "outlasts-the-budget", "dies-of-a-signal"],
)
async def test_update_goes_wrong(
    argv: list[str], values: dict[str, float], outcome: str, words: str, stages: Callable[..., Any]
) -> None:
    stage = await stages(
        host_1=[Vm(name="web-1", set="web", update_domain=0)],
        host_2=[Vm(name="web-2", set="web", update_domain=1)],
        up=False,
    )
    stage.sandbox.update("bad", argv, expected_s=1.0, **values)
    await stage.up("host-1", "host-2")
    rollout = await stage.roll("bad", budget_s=4.0)
    state = await stage.ended(rollout)
    assert state.status == "halted"
    assert words in state.reason, state.reason
    assert [wave.status for wave in state.waves] == ["failed", "pending"]
    (report,) = await stage.reports(rollout)
    assert (report.status, report.update.outcome) == ("failed", outcome)
    assert [each.state for each in report.vms] == ["running"]
    assert not stage.sandbox.watch.frozen()
    assert stage.sandbox.watch.longest_s() < 4.0
    assert {each.vm for each in stage.sandbox.watch.pauses} == {"web-1"}
    if "no space" in argv[-1]:
        assert "no space left" in report.update.output_tail
    await stage.sandbox.until(lambda: not stage.fleet_view.documents["web"].events, 5, "document empty")
    ends = [each.status for facts in stage.fleet_view.events.values() for each in facts]
    assert ends == ["scheduled", "started", "failed"]


async def test_a_broken_file_is_refused_by_name_and_line_and_the_others_stay(
    stages: Callable[..., Any],
) -> None:
    stage = await stages(host_1=[Vm(name="web-1", set="web")], up=False)
    folder = stage.sandbox.folder / "updates.d"
    (folder / "broken.toml").write_text('name = "broken"\nimpact = pause\n')
    (folder / "typo.toml").write_text('name = "typo"\nimpcat = "pause"\n')
    await stage.up("host-1")
    inventory = stage.fleet_view.hosts["host-1"]
    assert {each.update for each in inventory.updates} == {"patch"}
    refused = {each.file.rsplit("/", 1)[-1]: each for each in inventory.refused_updates}
    assert refused["broken.toml"].line == 2
    assert refused["typo.toml"].line == 2
    assert "impcat" in refused["typo.toml"].reason
    state = await stage.ended(await stage.roll())
    assert state.status == "completed", state.reason
