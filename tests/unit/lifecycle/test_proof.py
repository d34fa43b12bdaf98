"""What counts as proof of memory, for whom, and in which words."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from caesura.contract import messages as m
from caesura.lifecycle import proof


def test_every_code_has_its_words_and_only_memory_counts() -> None:
    assert set(proof.WORDS) == set(proof.BROKEN_WORDS) == set(get_args(m.ProofCode))
    assert proof.in_words(()) == "nothing shown"
    assert proof.in_words(["not_rebooted", "digest_equal"]) == "digest equal, not rebooted"
    assert not proof.is_proof(["not_rebooted"]), "a boot id says nothing of any page"
    strong: tuple[m.ProofCode, ...] = ("canary_equal", "sampled_digest_equal", "digest_equal")
    for code in strong:
        assert proof.is_proof(("not_rebooted", code))


@pytest.mark.parametrize(
    ("on_unproven", "asking"),
    [
        (None, {"swap", "replace"}),
        ("halt", {"swap", "replace", "freeze", "kexec"}),
        ("proceed", set()),
    ],
)
def test_who_is_asked_for_a_proof(on_unproven: Any, asking: set[str]) -> None:
    """A live update pauses nothing, and a reboot keeps no memory: neither is asked for one."""
    policy = m.Policy(on_unproven=on_unproven)
    assert {method for method in get_args(m.Method) if proof.asks_for_proof(policy, method)} == asking


def test_messages_of_the_first_v1_are_read_as_what_they_meant() -> None:
    digest = m.MemoryProof(proof="digest", ok=True)
    assert (proof.held_codes(digest), proof.broken_codes(digest)) == (("digest_equal",), ())
    other = m.MemoryProof(proof="heartbeat", ok=False)
    assert (proof.held_codes(other), proof.broken_codes(other)) == ((), ("not_rebooted",))
    nothing = m.MemoryProof(proof="none", ok=True)
    assert proof.held_codes(nothing) == proof.broken_codes(nothing) == proof.held_codes(None) == ()


def test_readers_of_the_first_v1_are_not_told_more_than_was_shown() -> None:
    sampled = proof.memory_proof(["sampled_digest_equal"])
    assert (sampled.proof, sampled.ok) == ("none", True), "they would read `digest` as all of memory"
    differs = proof.memory_proof(["not_rebooted"], ["sampled_digest_equal"])
    assert (differs.proof, differs.ok) == ("digest", False)
    assert proof.memory_proof(["canary_equal", "not_rebooted"]).proof == "heartbeat"


def test_looks_from_several_sides_are_one_proof() -> None:
    assert proof.combined(None, None) is None
    both = proof.combined(
        proof.memory_proof(["not_rebooted"], detail="same"),
        None,
        proof.memory_proof((), ["canary_equal"], "2 pages"),
    )
    assert both is not None
    assert (both.held, both.broken, both.ok) == (("not_rebooted",), ("canary_equal",), False)
    assert both.detail == "same; 2 pages"
