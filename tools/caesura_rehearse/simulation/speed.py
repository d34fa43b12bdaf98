"""``--speed``: what is waited for takes less time; what an application must do or survive takes as long as ever. Pure.

Shortened are notices, checks, and the time between steps and between update domains: nothing happens in them. Pauses, graces and slow answers are what is
rehearsed. NotBefore is the instant at which it happens, so the notice that the API shows is the shortened one.
"""

from __future__ import annotations

import msgspec

from caesura_rehearse.simulation.orders import Order

MOST_SPEED = 3600.0
LEAST_S = 2.0
"""s: a client that polls once a second must see each state; what is longer is not made shorter than this."""


def shortened(seconds: float, speed: float) -> float:
    """A time in which a client must see something."""
    return min(seconds, max(seconds / speed, LEAST_S))


def at_speed(order: Order, speed: float) -> Order:
    """The order with its waits shortened."""
    if speed == 1.0:
        return order
    return msgspec.structs.replace(
        order,
        notice_s=shortened(order.notice, speed),
        checks_s=shortened(order.checks_s, speed),
        soak_s=order.soak_s / speed,
        later_pauses=tuple(
            msgspec.structs.replace(each, after_s=shortened(each.after_s, speed))
            for each in order.later_pauses
        ),
    )
