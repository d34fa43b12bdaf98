"""The guest's workloads, run here: what they would miss is what a broken swap would be forgiven."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import pytest

from caesura_guest_image.inside.approve import Approver
from caesura_guest_image.inside.disk import BLOCK, DiskWorkload, make_block
from caesura_guest_image.inside.memory import PAGE, HotRegion, Region, period
from caesura_guest_image.inside.parameters import read_parameters
from caesura_guest_image.inside.tcp import Line

MIB = 1 << 20
x86_64_only = pytest.mark.skipif(platform.machine() != "x86_64", reason="the comparing is x86-64 code")


def test_parameters_are_those_of_ours_and_the_last_counts() -> None:
    found = read_parameters(
        "console=ttyS0 quiet caesura.run=a,b caesura.url=http://x/?a=b caesura.run=c caesura.odd\n"
    )
    assert found == {"run": "c", "url": "http://x/?a=b"}


@pytest.mark.parametrize("size", [PAGE, 10 * PAGE, MIB, 96 * MIB, 4096 * MIB])
def test_no_two_pages_of_the_pattern_begin_at_the_same_place(size: int) -> None:
    length = period(size)
    pages = size // PAGE
    # Pages begin at PAGE * k modulo the length; these differ for as many pages as this:
    assert length % 8 == 0
    assert (length // 8) % 2 == 1
    assert length // 8 >= pages


@x86_64_only
def test_one_changed_byte_is_found_wherever_it_is() -> None:
    region = Region(MIB + PAGE, seed=1)
    assert region.first_difference() is None
    for offset in (0, 1, 63, 64, period(region.size) - 1, period(region.size), 700_001, region.size - 1):
        region.damage(offset)
        assert region.first_difference() == offset
        region.damage(offset)
    assert region.first_difference() is None


@x86_64_only
def test_pages_that_changed_places_are_found() -> None:
    region = Region(MIB, seed=1)
    one, two = slice(3 * PAGE, 4 * PAGE), slice(200 * PAGE, 201 * PAGE)
    memory = region._map
    memory[one], memory[two] = memory[two], memory[one]
    assert region.first_difference() == 3 * PAGE


@x86_64_only
def test_every_single_byte_of_a_page_is_compared() -> None:
    region = Region(PAGE, seed=3)
    for offset in range(PAGE):
        region.damage(offset)
        assert region.first_difference() == offset
        region.damage(offset)


def test_another_seed_is_another_pattern() -> None:
    assert Region(PAGE, seed=1)._map[:] != Region(PAGE, seed=2)._map[:]


def test_a_lost_write_of_the_hot_region_is_found() -> None:
    hot = HotRegion(4 * 65536, seed=1)
    for _ in range(11):
        hot.write()
        assert hot.first_difference() is None
    before = hot._map[:]
    hot.write()
    hot._map[:] = before  # as if the last write had not come along
    assert hot.first_difference() is not None


def test_without_a_hot_region_there_is_nothing_to_compare() -> None:
    assert HotRegion(0, seed=1).first_difference() is None


def disk(tmp_path: Path) -> DiskWorkload:
    path = tmp_path / "disk"
    path.write_bytes(bytes(8 * BLOCK))
    try:
        return DiskWorkload(str(path), 8)
    except OSError as error:  # a tmpfs knows no O_DIRECT
        pytest.skip(f"no O_DIRECT in {tmp_path}: {error}")


def test_a_block_that_is_older_than_the_last_write_is_found(tmp_path: Path) -> None:
    work = disk(tmp_path)
    for _ in range(20):
        work.write()
    assert work.first_bad() is None
    number = work.sequence % 8
    # A valid block with a right checksum, only of an earlier write: a lost write looks like this.
    with (tmp_path / "disk").open("r+b") as file:
        file.seek(number * BLOCK)
        file.write(make_block(number, work.sequence - 8))
    assert work.first_bad() == number


def test_blocks_are_of_one_size() -> None:
    assert {len(make_block(number, sequence)) for number, sequence in ((0, 0), (255, 10**12))} == {BLOCK}


def test_a_connection_that_cannot_be_made_is_told_and_tried_again() -> None:
    line = Line(("127.0.0.1", 1))
    line.tick()
    line.tick()
    status = json.loads(line.status())
    assert not status["connected"]
    assert "refused" in status["last_error"]


def test_the_approver_survives_a_missing_service() -> None:
    approver = Approver("vm", "http://127.0.0.1:1/metadata/scheduledevents?api-version=2020-07-01")
    approver.poll()
    assert json.loads(approver.status())["errors"] == 1
