"""What was shown about a guest's memory: its wording, what counts as proof, what a policy requires. Pure.

Memory itself is compared on its host: digests in ``operation/machine.py`` and the drivers' ``memory_comparison``, the canary in
``clocks/verdict.py``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Literal, get_args

from caesura.contract.messages import MemoryProof, Method, Policy, ProofCode

WORDS: dict[ProofCode, str] = {
    "not_rebooted": "not rebooted",
    "canary_equal": "canary equal",
    "sampled_digest_equal": "sampled digest equal",
    "digest_equal": "digest equal",
}
"""The exact wording, in every text for people."""
BROKEN_WORDS: dict[ProofCode, str] = {
    "not_rebooted": "rebooted",
    "canary_equal": "canary differs",
    "sampled_digest_equal": "sampled digest differs",
    "digest_equal": "digest differs",
}
NONE = "nothing shown"
PAUSING: frozenset[Method] = frozenset({"swap", "freeze", "replace", "kexec"})
"""The methods that promise to keep memory and pause the guest."""
SAVING: frozenset[Method] = frozenset({"replace", "kexec"})
"""Those that save the guest's device state to a file, which another process loads: no process has the guest in between."""
SUCCEEDING: frozenset[Method] = frozenset({"swap", *SAVING})
"""Those after which another process has the guest."""
_OF_MEMORY: frozenset[ProofCode] = frozenset({"canary_equal", "sampled_digest_equal", "digest_equal"})
_ORDER: tuple[ProofCode, ...] = tuple(reversed(get_args(ProofCode)))
"""The strongest first."""


def ordered(codes: Iterable[str]) -> tuple[ProofCode, ...]:
    """Each once, the strongest first; codes that this version does not know do not count as proof."""
    found = set(codes)
    return tuple(code for code in _ORDER if code in found)


def in_words(codes: Iterable[ProofCode]) -> str:
    """``digest equal, not rebooted``; ``nothing shown`` for none."""
    return ", ".join(WORDS[code] for code in ordered(codes)) or NONE


def is_proof(codes: Collection[ProofCode]) -> bool:
    """Whether this shows that memory is unchanged; that a guest did not reboot says nothing about its pages."""
    return bool(_OF_MEMORY & set(codes))


def held_codes(memory: MemoryProof | None) -> tuple[ProofCode, ...]:
    """What was shown; also for a message of the first v1, which had no codes."""
    if memory is None:
        return ()
    if memory.held or memory.broken or not memory.ok:
        return memory.held
    return _legacy(memory)


def broken_codes(memory: MemoryProof | None) -> tuple[ProofCode, ...]:
    """What was checked and does not hold."""
    if memory is None or memory.ok:
        return ()
    return memory.broken or _legacy(memory)


def _legacy(memory: MemoryProof) -> tuple[ProofCode, ...]:
    codes: dict[str, ProofCode] = {"digest": "digest_equal", "heartbeat": "not_rebooted"}
    return (codes[memory.proof],) if memory.proof in codes else ()


def memory_proof(
    held: Iterable[ProofCode] = (), broken: Iterable[ProofCode] = (), detail: str = ""
) -> MemoryProof:
    """The record, with the members for readers of the first v1: they have no code for samples, which are not all of memory."""
    good, bad = ordered(held), ordered(broken)
    kind: Literal["digest", "heartbeat", "none"] = "none"
    if "digest_equal" in (*good, *bad) or "sampled_digest_equal" in bad:
        kind = "digest"
    elif good or bad:
        kind = "heartbeat" if {"not_rebooted", "canary_equal"} & {*good, *bad} else "none"
    return MemoryProof(proof=kind, ok=not bad, detail=detail[:4096], held=good, broken=bad)


def combined(*proofs: MemoryProof | None) -> MemoryProof | None:
    """Several checks of one guest merged into one; None if there was none."""
    seen = [proof for proof in proofs if proof is not None]
    if not seen:
        return None
    detail = "; ".join(dict.fromkeys(proof.detail for proof in seen if proof.detail))
    return memory_proof(
        [code for proof in seen for code in held_codes(proof)],
        [code for proof in seen for code in broken_codes(proof)],
        detail,
    )


def asks_for_proof(policy: Policy, method: Method) -> bool:
    """Whether a pause by this method halts the rollout unless memory was shown to be unchanged."""
    if method not in PAUSING:
        return False  # no pause, or a reboot, which does not keep memory
    if policy.on_unproven is None:
        return method in ("swap", "replace")
    return policy.on_unproven == "halt"
