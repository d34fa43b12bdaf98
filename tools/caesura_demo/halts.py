"""Which halts only mean that a component was unavailable: those may be resumed automatically. Pure.

By a resume the operator accepts the findings, and a wave whose hosts all completed their part is
then not verified again. So only codes that are known to mean "was unavailable, and nothing was found" are resumed; all
other halts, and unknown codes, are for a person to judge. A host that never reported (``report_lost``) is not among
them: its later report is not verified by a resume.
"""

from __future__ import annotations

from collections.abc import Collection

from caesura.contract.reasons import TRANSIENT


def is_transient(codes: Collection[str]) -> bool:
    """Whether every code of a halt means that a component was unavailable, and none is a finding."""
    return bool(codes) and TRANSIENT.issuperset(codes)
