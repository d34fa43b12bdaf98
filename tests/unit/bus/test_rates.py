from __future__ import annotations

from caesura.bus.rates import LIMITS, Limit, Rates, writer_of

OWN = "caesura/v1/vm/web-1/presence"


def test_each_writer_has_a_rate_of_its_own() -> None:
    rates = Rates({"vm": Limit(per_s=10, burst=3)})
    assert [rates.admits(OWN, 100, 0.0) for _ in range(5)] == [True, True, True, False, False]
    assert rates.admits("caesura/v1/vm/web-1/hook", 100, 0.05) is False, "all its topics together"
    assert rates.admits("caesura/v1/vm/web-2/presence", 100, 0.0)
    assert rates.admits(OWN, 100, 0.2), "tokens come back"
    assert [rates.admits(OWN, 100, 60.0) for _ in range(4)] == [True, True, True, False], (
        "no more than the burst"
    )


def test_what_is_large_costs_more() -> None:
    rates = Rates({"host": Limit(per_s=1, burst=65)})
    topic = "caesura/v1/host/h1/inventory"
    assert rates.admits(topic, 256 * 1024, 0.0)
    assert not rates.admits(topic, 256 * 1024, 1.0)


def test_the_coordinator_has_no_limit() -> None:
    rates = Rates()
    assert all(rates.admits("caesura/v1/fleet/coordinator", 10**6, 0.0) for _ in range(100_000))


def test_a_full_host_at_once_is_within_its_limit() -> None:
    rates = Rates()
    facts = [f"caesura/v1/host/h1/set/web/ud/0/vm/web-{n}/frozen" for n in range(1024)] * 3
    assert all(rates.admits(topic, 1000, 0.0) for topic in facts)
    assert all(rates.admits("caesura/v1/host/h1/inventory", 256 * 1024, n * 0.1) for n in range(100))


def test_who_writes_is_in_the_topic() -> None:
    assert writer_of(OWN) == ("vm", "web-1")
    assert writer_of("caesura/v1/vm") == ("", "")
    assert set(LIMITS) == {"vm", "host", "metadata", "ctl", "exporter"}
