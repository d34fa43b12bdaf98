"""The canary: whatever a pause does to its pages or its index is found, and a guest whose memory is whole is never accused."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from caesura_vm_agent.canary import PAGE_BYTES, Canary, key_of, page_of

SEED = bytes(range(32))
PAGES = 5


class Guest:
    """A canary and the memory it lives in, to be damaged."""

    def __init__(self, rewrites: int = 0) -> None:
        self.memory = bytearray(PAGES * PAGE_BYTES)
        self.canary = Canary(self.memory, PAGES, SEED)
        for _ in range(PAGES + rewrites):
            self.canary.rewrite()

    def page(self, number: int) -> bytes:
        return bytes(self.memory[number * PAGE_BYTES : (number + 1) * PAGE_BYTES])

    def put(self, number: int, page: bytes) -> None:
        self.memory[number * PAGE_BYTES : (number + 1) * PAGE_BYTES] = page

    def look(self) -> dict[int, str]:
        for number in range(PAGES):
            self.canary.check(number)
        return {each.number: each.why for each in self.canary.take()}


def _repeated(some: bytes) -> bytes:
    return (some * PAGE_BYTES)[:PAGE_BYTES]


some_rewrites = st.integers(0, 3 * PAGES)
some_page = st.integers(0, PAGES - 1)


@given(some_rewrites)
@settings(deadline=None)
def test_memory_that_stayed_as_it_was_is_never_accused(rewrites: int) -> None:
    guest = Guest(rewrites)
    assert guest.look() == {}
    guest.canary.rewrite()
    assert guest.look() == {}


@given(some_rewrites, some_page, st.integers(0, 8 * PAGE_BYTES - 1))
@settings(deadline=None)
def test_any_flipped_bit_is_found(rewrites: int, number: int, bit: int) -> None:
    guest = Guest(rewrites)
    guest.memory[number * PAGE_BYTES + bit // 8] ^= 1 << bit % 8
    assert list(guest.look()) == [number]


@given(some_rewrites, st.integers(1, 2 * PAGES), some_page)
@settings(deadline=None)
def test_any_older_copy_of_a_page_is_found(rewrites: int, later: int, number: int) -> None:
    guest = Guest(rewrites)
    old = guest.page(number)
    for _ in range(later):
        guest.canary.rewrite()
    changed = guest.page(number) != old
    guest.put(number, old)
    assert list(guest.look()) == ([number] if changed else [])


@given(some_rewrites, some_page, some_page)
@settings(deadline=None)
def test_any_two_pages_that_changed_places_are_found(rewrites: int, one: int, two: int) -> None:
    guest = Guest(rewrites)
    first, second = guest.page(one), guest.page(two)
    guest.put(one, second)
    guest.put(two, first)
    assert set(guest.look()) == ({one, two} if one != two else set())


@given(
    some_rewrites, some_page, st.just(bytes(PAGE_BYTES)) | st.binary(min_size=1, max_size=8).map(_repeated)
)
@settings(deadline=None)
def test_any_other_page_is_found(rewrites: int, number: int, page: bytes) -> None:
    guest = Guest(rewrites)
    guest.put(number, page)
    assert list(guest.look()) == [number]


@given(some_rewrites, st.integers(0, 63), st.sampled_from([0, 1]))
@settings(deadline=None)
def test_a_damaged_count_is_found_in_either_copy(rewrites: int, bit: int, copy: int) -> None:
    guest = Guest(rewrites)
    guest.canary._count[copy] ^= 1 << bit
    assert len(guest.look()) == PAGES


@given(some_rewrites, st.integers(1, 2 * PAGES))
@settings(deadline=None)
def test_an_older_count_is_found_by_the_pages(rewrites: int, later: int) -> None:
    """The page of memory that holds the count is as likely to be stale as any other."""
    guest = Guest(rewrites)
    old = guest.canary._count[:]
    for _ in range(later):
        guest.canary.rewrite()
    guest.canary._count[:] = old
    assert len(guest.look()) == min(later, PAGES)


@given(some_rewrites, st.integers(1, 2 * PAGES))
@settings(deadline=None)
def test_older_pages_with_their_older_count_show_in_the_count_alone(rewrites: int, later: int) -> None:
    """Nobody inside can know: the host compares the count with the one of before the pause."""
    guest = Guest(rewrites)
    pages, count = bytes(guest.memory), guest.canary._count[:]
    for _ in range(later):
        guest.canary.rewrite()
    before = guest.canary.writes
    guest.memory[:] = pages
    guest.canary._count[:] = count
    assert guest.look() == {}
    assert guest.canary.writes < before


@given(some_page, st.integers(1, 3 * PAGES))
@settings(deadline=None)
def test_rewriting_wipes_out_nothing_unseen(number: int, rewrites: int) -> None:
    """The guest runs for a moment before it is asked: a bad page that was rewritten in it must still be known."""
    guest = Guest()
    guest.put(number, bytes(PAGE_BYTES))
    for _ in range(rewrites):
        guest.canary.rewrite()
    assert guest.look() == {number: "is zeroed"}


def test_what_is_wrong_is_said_once_and_in_words() -> None:
    guest = Guest(rewrites=PAGES)
    pages = [guest.page(number) for number in range(PAGES)]
    guest.put(0, bytes(PAGE_BYTES))
    guest.put(1, pages[2])
    guest.put(2, page_of(key_of(SEED), 2, 3))
    guest.put(3, random.Random(1).randbytes(PAGE_BYTES))
    assert guest.look() == {
        0: "is zeroed",
        1: "holds page 2",
        2: "holds write 3 instead of 8",
        3: "is damaged",
    }
    assert guest.look() == {}, "the next pause is not blamed for it"


def test_pages_of_an_earlier_start_are_not_taken_for_current_ones() -> None:
    guest = Guest()
    guest.put(1, page_of(key_of(b"another start"), 1, 2))
    assert list(guest.look()) == [1]


def test_a_page_that_was_never_written_is_not_judged() -> None:
    memory = bytearray(b"\xaa" * PAGES * PAGE_BYTES)
    canary = Canary(memory, PAGES, SEED)
    canary.rewrite()
    assert not canary.filled
    for number in range(PAGES):
        canary.check(number)
    assert canary.take() == ()


def test_no_canary_at_all() -> None:
    canary = Canary(bytearray(), 0, SEED)
    canary.rewrite()
    assert (canary.writes, canary.filled, canary.take()) == (0, True, ())


@pytest.mark.parametrize(("canary", "lost", "least"), [(1024, 256, 0.62), (1024, 1024, 0.98)])
def test_a_lost_page_is_found_with_the_probability_that_is_documented(
    canary: int, lost: int, least: float
) -> None:
    """4 MiB of canary in a guest of 1 GiB: ``1 - (1 - c/n) ** k``, and by drawing."""
    pages = 2**18
    assert 1 - (1 - canary / pages) ** lost == pytest.approx(least, abs=0.02)
    draw = random.Random(7)
    tries = 400
    found = sum(any(draw.randrange(pages) < canary for _ in range(lost)) for _ in range(tries))
    assert found / tries == pytest.approx(least, abs=0.08)
