"""When steps are due, on a clock of the test's own."""

from __future__ import annotations

from caesura_rehearse.scenarios.reader import parse_scenario
from caesura_rehearse.scenarios.scenario import OnEventStep, OrderStep, Step
from caesura_rehearse.scenarios.script import Script, Wait


class Stage:
    """Plays a script: an event lasts as long as its notice; all times are seconds."""

    def __init__(self, text: str, speed: float = 1.0) -> None:
        self.script = Script(parse_scenario(f'title = "t"\n{text}', "t.toml").steps, speed)
        self.speed = speed
        self.now = 0.0
        self.announced: dict[str, float] = {}
        self.ends: dict[str, float] = {}

    @property
    def open(self) -> set[str]:
        return {name for name, end in self.ends.items() if end > self.now}

    def play(self) -> list[tuple[float, str]]:
        """What was carried out, and when."""
        done = []
        while (due := self.script.next(self.now, self.announced, self.open)) is not None:
            if isinstance(due, Wait):
                until = [self.ends[name] for name in self.open] + (
                    [] if due.until_s is None else [due.until_s]
                )
                assert until, "it waits for nothing"
                self.now = min(until)
                continue
            done.append((self.now, self._carry_out(due)))
        return done

    def _carry_out(self, step: Step) -> str:
        match step:
            case OrderStep():
                self.announced[step.name] = self.now
                self.ends[step.name] = self.now + step.order.notice / self.speed
                return step.name
            case OnEventStep():
                return f"{step.what} {step.name}"
            case _:
                return str(step.fault)


TWO = """
[[step]]
event = "Freeze"
name = "first"
notice = "60s"
[[step]]
cancel = "first"
after = "30s"
[[step]]
at = "50s"
fault = "500"
[[step]]
event = "Reboot"
name = "second"
notice = "10s"
[[step]]
at = "100s"
event = "Preempt"
name = "third"
notice = "5s"
"""


def test_each_step_at_its_time_or_when_those_before_are_over() -> None:
    assert Stage(TWO).play() == [
        (0, "first"),
        (30, "cancel first"),
        (50, "500"),
        (60, "second"),
        (100, "third"),
    ]


def test_speed_shortens_the_time_between() -> None:
    assert [at for at, _ in Stage(TWO, speed=10.0).play()] == [0, 3, 5, 6, 10]


def test_a_step_on_an_event_that_is_over_is_due_at_once() -> None:
    stage = Stage(TWO)
    first = stage.script.next(0.0, {}, set())
    assert isinstance(first, OrderStep)
    late = stage.script.next(1.0, {"first": 0.0}, set())
    assert isinstance(late, OnEventStep)


def test_steps_stay_in_order() -> None:
    stage = Stage(
        '[[step]]\nevent = "Freeze"\nname = "a"\nat = "20s"\n[[step]]\nfault = "drop"\n[[step]]\nno_faults = true'
    )
    assert stage.play() == [(20, "a"), (20, "drop"), (20, "None")]
