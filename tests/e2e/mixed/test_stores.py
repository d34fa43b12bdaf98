"""Stores as the version before 0.1.0 wrote them: all that it kept is taken up, what waited to be sent included."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from caesura.contract import messages as m
from caesura.contract.envelope import source_of
from caesura_coordinator.store import CoordinatorStore
from caesura_host_updater.epoch_authority import EpochAuthority
from caesura_host_updater.journal import Journal
from caesura_testing.patience import patient

_COORDINATOR = """
import sys
from datetime import UTC, datetime
from caesura.contract import messages as m
from caesura_coordinator.store import Store

at = datetime(2026, 4, 20, 12, 0, 0, tzinfo=UTC)
store = Store(sys.argv[1])
store.save_epoch(7)
store.save_owner("web-1", "host-1", 7)
store.save_document(m.SetDocument(set="web", incarnation=3, events=()))
refused = m.Plan(update="patch", refusals=(m.Refusal(subject="host-1", reason="it is offline"),))
store.save_answer("ops", m.RequestAnswered(request="r-1", accepted=False, reason="host-1: it is offline", plan=refused))
store.enqueue(m.SetDocument(set="web", incarnation=3, events=()), set="web")
store.enqueue(
    m.EventChanged(
        event_id="E-1", set="web", event_type="Freeze", status="completed", resources=("web-1",), incarnation=3,
        not_before=at, at=at,
    ),
    set="web", status="completed",
)
wave = m.WaveState(wave=0, status="completed", domains={"web": 0}, hosts=("host-1",), vms=("web-1",))
store.enqueue(
    m.RolloutState(
        rollout="r", update="patch", status="completed", policy=m.Policy(), sets=("web",), waves=(wave,), created_at=at
    ),
    rollout="r",
)
store.database.close()
"""

_HOST = """
import sys
from datetime import UTC, datetime
import msgspec
from caesura.contract import messages as m
from caesura_host_updater.command import Authority
from caesura_host_updater.journal import Journal
from caesura_host_updater.outbox import letter_for

at = datetime(2026, 4, 20, 12, 0, 0, tzinfo=UTC)
journal = Journal(sys.argv[1])
journal.obey(Authority(7, "c-7"))
verdict = m.VmClockSynced(vm="web-1", host="host-1", set="web", update_domain=0, synced=True, by="agent", at=at)
letter = letter_for(verdict, "e-1", {"host": "host-1", "set": "web", "ud": 0, "vm": "web-1"})
report = m.OperationReported(operation="op-1", host="host-1", epoch=7, status="failed", reason="it broke", at=at)
journal.finish(report, [letter_for(report, "e-0", {"host": "host-1"})])
journal.judged("web-1", "op-1", [letter])
journal.close()
"""


@pytest.fixture
def written_by(other: Any, sources: Callable[[Any], Path | None], tmp_path: Path) -> Callable[[str], str]:
    """Run a script of the other version that writes a store; its path."""

    def run(script: str) -> str:
        folder = sources(other)
        path = str(tmp_path / "store.sqlite")
        environ = {**os.environ, "PYTHONPATH": f"{folder}/services:{folder}/shared"}
        done = subprocess.run(
            [sys.executable, "-c", script, path],
            env=environ,
            capture_output=True,
            text=True,
            timeout=patient(60),
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return path

    return run


def test_a_coordinators_store_is_taken_up(written_by: Callable[[str], str]) -> None:
    store = CoordinatorStore(written_by(_COORDINATOR))
    with capture_logs() as logs:
        store.write_as(source_of("default", "coordinator"))
    assert store.epoch() == 7
    assert store.owners() == {"web-1": ("host-1", 7)}
    assert store.documents()["web"].incarnation == 3
    answer = store.answer("ops", "r-1")
    assert answer is not None
    assert answer.plan is not None
    assert [(each.reason, each.code) for each in answer.plan.refusals] == [("it is offline", "unexplained")]
    waiting = [each.read() for each in store.outbox.load()]
    assert [type(each) for each in waiting] == [m.SetDocument, m.EventChanged]
    # Its waves have topics of their own since; every rollout is published again at the start.
    assert [(line["event"], line["log_level"]) for line in logs] == [("outbox.unreadable", "error")]
    store.database.close()

    again = CoordinatorStore(store.database.path)
    with capture_logs() as logs:
        again.write_as(source_of("default", "coordinator"))
    assert logs == [], "said once, not at every start"
    assert len(again.outbox.load()) == 2
    again.database.close()


def test_a_hosts_journal_is_taken_up(written_by: Callable[[str], str]) -> None:
    journal = Journal(written_by(_HOST))
    journal.upgrade_outbox("default")
    assert journal.authority() == EpochAuthority(7, "c-7")
    entry = journal.find("op-1")
    assert entry is not None
    assert entry.report is not None
    assert (entry.report.status, entry.report.reason, entry.report.codes) == ("failed", "it broke", ())
    waiting = journal.outbox.load()
    assert [each.event_id for each in waiting] == ["e-0", "e-1"], "in order, under the ids of before"
    assert [type(each.read()) for each in waiting] == [m.OperationReported, m.VmClockSynced]
    journal.close()
