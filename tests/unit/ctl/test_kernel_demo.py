"""What the demo of method kexec promises, and when it says that a promise was broken."""

from __future__ import annotations

import pytest

from caesura.contract.parts import WholeRollout
from caesura_demo.kernel_demo import judge
from caesura_nested_host.guests import Beat, GuestPause
from caesura_nested_host.image import Image
from caesura_testing.rollouts import changed, whole_rollout

IMAGE = Image("disk", "boot", "6.1.0-47-amd64", "6.1.0-50-amd64")
COMPLETED = changed(whole_rollout(waves=[]), status="completed")


def pause(seconds: float = 20.0, *faults: str) -> GuestPause:
    return GuestPause(Beat(1.0, 1, 0.2, "b"), Beat(1.0 + seconds, 2, 0.4, "b"), "memory 1 bad=0", faults)


def broken(
    pauses: dict[str, GuestPause], *, rollout: WholeRollout = COMPLETED, kernel: str = IMAGE.new
) -> list[str]:
    return [check.rule for check in judge(rollout, kernel, IMAGE, pauses) if not check.held]


def test_all_of_it_held() -> None:
    assert broken({"a": pause(), "b": pause(30.0)}) == []


@pytest.mark.parametrize(
    ("rule", "found"),
    [
        ("the rollout completed", broken({"a": pause()}, rollout=changed(COMPLETED, status="halted"))),
        ("the host runs the new kernel", broken({"a": pause()}, kernel=IMAGE.old)),
        ("silent for at most 30 s", broken({"a": pause(), "b": pause(30.1)})),
        (
            "memory, boot and sequence as they were",
            broken({"a": pause(), "b": pause(20.0, "it booted again")}),
        ),
    ],
)
def test_a_promise_that_was_broken_is_the_only_one_named(rule: str, found: list[str]) -> None:
    assert found == [rule]
