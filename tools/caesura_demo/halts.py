"""Which halts only say that something was away: those may be resumed without a person. Pure.

A resume tells the coordinator that the operator accepts what was found, and a wave whose hosts all did their part is
then not verified again. So only codes that are known to say "was away, and nothing was found" are resumed; whatever
else halts, and whatever is new, is for a person to judge. A host that never reported (``report_lost``) is not among
them: what it reports later is not verified by a resume.
"""

from __future__ import annotations

from collections.abc import Collection

from caesura.contract.reasons import TRANSIENT


def was_away(codes: Collection[str]) -> bool:
    """Whether everything that a halt names is something that was away, and is not a finding."""
    return bool(codes) and TRANSIENT.issuperset(codes)
