"""All rules against one server."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from caesura_metadata_conformance.approvals import APPROVALS
from caesura_metadata_conformance.documents import DOCUMENTS
from caesura_metadata_conformance.events import EVENTS
from caesura_metadata_conformance.instance import METADATA
from caesura_metadata_conformance.probe import Probe
from caesura_metadata_conformance.requests import REQUESTS
from caesura_metadata_conformance.rule import RuleResult, judge_all
from caesura_metadata_conformance.versions import VERSIONS

BOOKS = (REQUESTS, VERSIONS, DOCUMENTS, EVENTS, APPROVALS, METADATA)
"""In the order in which they are checked: approvals may change the events."""


def check_server(probe: Probe, only: Sequence[str] = ()) -> list[RuleResult]:
    """What every rule finds, in order; ``only``: numbers, or beginnings of them."""
    return judge_all(BOOKS, probe, only)


def count(results: Sequence[RuleResult]) -> tuple[int, int, int]:
    """How many passed, failed, and could not be judged."""
    found = Counter(each.verdict for each in results)
    return found["passes"], found["fails"], found["cannot tell"]
