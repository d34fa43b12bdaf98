"""What tests conclude from a guest's heartbeat, and how they start it."""

from __future__ import annotations

from pathlib import Path

import pytest

from caesura_testing.guests import (
    Beat,
    Definition,
    Heartbeat,
    Image,
    command_line,
    kernel_command_line,
    parse_beat,
)

BOOT = "cc3cc7c5-4886-4bae-89ad-10d1ae522ec7"


def beat(
    count: int, received: float, *, monotonic_ns: int | None = None, boot: str = BOOT, back: int = 0
) -> Beat:
    return Beat(received, count, monotonic_ns if monotonic_ns is not None else count * 1000, 0, boot, back)


def heartbeat(*beats: Beat) -> Heartbeat:
    found = Heartbeat()
    found.beats += beats
    return found


def test_a_beat_is_read() -> None:
    found = parse_beat(f"7 3113706755 1795417397040599565 {BOOT} 0\n".encode(), 1.5)
    assert found == Beat(1.5, 7, 3113706755, 1795417397040599565, BOOT, 0)


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"\n",
        b"7 31\n",
        b"7 8 9 short 0\n",
        f"7 8 9 {BOOT} 0".encode(),
        b"\xff 1 2 3 4\n",
        b"a b c d e\n",
    ],
)
def test_a_cut_line_is_no_beat(line: bytes) -> None:
    assert parse_beat(line, 0) is None


def test_gaps() -> None:
    found = heartbeat(*(beat(count, at) for count, at in enumerate((1.0, 1.1, 1.5, 1.6), 1)))
    assert found.longest_gap_s() == pytest.approx(0.4)
    assert found.longest_gap_s(since=1.3) == pytest.approx(0.4), "the gap that `since` is in counts whole"
    assert found.longest_gap_s(since=1.5) == pytest.approx(0.1)
    assert found.longest_gap_s(since=1.5, until=3.0) == pytest.approx(1.4), "silence up to the end counts"
    assert heartbeat().longest_gap_s() == 0


def test_missing_beats_are_counted() -> None:
    assert heartbeat(beat(3, 1), beat(4, 2), beat(8, 3)).missing() == 3
    assert heartbeat().missing() == 0


@pytest.mark.parametrize(
    ("second", "said"),
    [
        (beat(2, 2), []),
        (beat(2, 2, boot=BOOT.replace("c", "d")), ["the guest booted again after beat 1"]),
        (beat(1, 2), ["beat 1 came after beat 1"]),
        (beat(2, 2, monotonic_ns=5), ["CLOCK_MONOTONIC went back at beat 2"]),
        (beat(2, 2, back=1), ["the guest saw CLOCK_MONOTONIC go back 1 times"]),
    ],
)
def test_faults_are_named(second: Beat, said: list[str]) -> None:
    assert heartbeat(beat(1, 1), second).faults() == said


def test_the_kernel_command_line_configures_init_workloads_and_agent() -> None:
    words = kernel_command_line(
        Definition(run=("heartbeat", "memory"), parameters={"memory": "60"}, agent={"vm": "web-1"})
    ).split()
    assert "caesura.run=heartbeat,memory" in words
    assert "caesura.memory=60" in words
    assert "CAESURA_VM_AGENT_VM=web-1" in words


def test_guest_ram_is_a_shared_file_and_the_machine_has_a_version() -> None:
    argv = command_line(
        Definition(memory_mib=96, run=("disk",), disks=((Path("/d/x.qcow2"), "qcow2"),)),
        Path("/run/vm"),
        Path("/run/shm/ram"),
        Image(kernel="/k", initrd="/i"),
    )
    assert "pc-q35-7.2,memory-backend=ram" in argv
    assert "memory-backend-file,id=ram,mem-path=/run/shm/ram,size=96M,share=on" in argv
    assert "virtserialport,chardev=disk,name=org.caesura.disk.0" in argv
    assert "virtserialport,chardev=heartbeat,name=org.caesura.heartbeat.0" in argv, "always there"
    assert "driver=qcow2,node-name=d0,file.driver=file,file.filename=/d/x.qcow2" in argv
