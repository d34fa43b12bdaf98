"""*Maintenance overview*: is a VM paused now, does a rollout run, did a pause take too long?"""

from __future__ import annotations

from grafana.generate.page import (
    OF_ROW,
    OF_SERIES,
    choice,
    link_to_domain,
    page,
    scrape_choices,
    wave_marks,
)
from grafana.generate.panels import (
    NONE_WANTED,
    Ask,
    Panel,
    Size,
    bars,
    curve,
    from_on,
    heat,
    named,
    number,
    rows,
    timeline,
)
from grafana.generate.queries import PAUSED_FROM, SCRAPED, SETS, STATES, domain_states, is_, new_in_window, of
from grafana_foundation_sdk.models.dashboard import Dashboard

STATE_WORDS = [
    *named({code: (name, colour) for code, (name, colour) in enumerate(STATES)}),
    from_on(PAUSED_FROM, PAUSED_FROM + len(STATES), "paused", "orange"),
]
_BY_DOMAIN = "{{set}} · {{update_domain}}"
_BY_PAUSE = "set, update_domain, host, method"
_OPEN = of("caesura_host_pause_open_seconds", SETS)
_OPEN_BUDGET = of("caesura_host_pause_budget_seconds", SETS)
_BUDGET = of("caesura_pause_budget_seconds", SETS)
_LAST = of("caesura_pause_last_seconds", SETS)
_LAST_BUDGET = of("caesura_pause_last_budget_seconds", SETS)


def _now() -> list[Panel]:
    active = of("caesura_rollout_status", SETS, 'status=~"running|aborting"')
    return [
        number(
            "VMs paused now",
            "VMs that are paused at this moment, as reported by the hosts.",
            Ask(f"sum(max by (set, update_domain) ({of('caesura_vms', SETS, is_('state', 'paused'))}))"),
            steps=((None, "green"), (1, "orange")),
        ),
        number(
            "Sets in a rollout",
            "Availability sets whose rollout is running or being aborted.",
            Ask(f"sum(max by (set) ({active}))"),
            steps=((None, "green"), (1, "blue")),
        ),
        number(
            "Sets halted",
            "Availability sets whose rollout is halted: no VM is paused, and the rollout does not continue by itself.",
            Ask(f"sum(max by (set) ({of('caesura_rollout_status', SETS, is_('status', 'halted'))}))"),
            steps=NONE_WANTED,
        ),
        number(
            "Budget used",
            "The longest pause of each domain's last operation, as a part of its budget; the worst domain counts.",
            Ask(f"max({_LAST} / {_LAST_BUDGET})"),
            unit="percentunit",
            decimals=0,
            steps=((None, "green"), (0.8, "orange"), (1, "red")),
        ),
        number(
            "Pauses beyond budget",
            "Pauses that lasted longer than their budget, since the exporter's start.",
            Ask(f"max(sum by (job, instance) ({of('caesura_pause_overruns_total', SETS)}))"),
            steps=NONE_WANTED,
        ),
        number(
            "Guests unsynced",
            "VMs whose clock could not be corrected after their last pause.",
            Ask(f"sum(max by (set, update_domain) ({of('caesura_vms_unsynced', SETS)}))"),
            steps=NONE_WANTED,
        ),
    ]


def _rollout() -> list[Panel]:
    return [
        timeline(
            "Update domains",
            "The state of every domain in its set's newest rollout, and when VMs of it were paused. "
            "A rollout by fault domain appears under the numbers of its fault domains. Click a lane for its dashboard.",
            Ask(domain_states(SETS), _BY_DOMAIN),
            size=Size(24, 9),
            words=STATE_WORDS,
            link=link_to_domain(*OF_SERIES),
        ),
        bars(
            "Rollout progress",
            "Completed share of the waves that touch the set, in its newest rollout.",
            Ask(
                f"max by (set) ({of('caesura_rollout_waves_completed', SETS)} "
                f"/ {of('caesura_rollout_waves', SETS)})",
                "{{set}}",
            ),
            size=Size(8, 7),
            unit="percentunit",
            most=1,
            steps=((None, "blue"), (1, "green")),
        ),
        rows(
            "Paused now",
            "The paused VMs, since when (as received by the exporter), and the budget. Usually empty.",
            Ask(f"max by ({_BY_PAUSE}) ({_OPEN}) > 0"),
            Ask(f"max by ({_BY_PAUSE}) ({_OPEN_BUDGET}) and on ({_BY_PAUSE}) ({_OPEN} > 0)"),
            size=Size(16, 7),
            columns={
                "set": "Set",
                "update_domain": "Domain",
                "host": "Host",
                "method": "Method",
                "Value #A": "Paused for",
                "Value #B": "Budget",
            },
            unit="s",
            nothing="No VM is paused",
            link=link_to_domain(*OF_ROW),
        ),
    ]


def _pauses() -> list[Panel]:
    return [
        curve(
            "Pause seconds per update domain",
            "The longest pause of each domain's last operation, measured on its host's monotonic clock, "
            "and the budget of its set.",
            Ask(f"max by (set, update_domain) ({_LAST})", _BY_DOMAIN),
            Ask(f"min by (set) ({_BUDGET})", "budget of {{set}}"),
            size=Size(14, 9),
            unit="s",
            limits="/^budget of/",
            link=link_to_domain(*OF_SERIES),
        ),
        heat(
            "How long pauses were",
            "Pauses by their length over time.",
            "max by (le) (sum by (le, job, instance) "
            f"({new_in_window(of('caesura_pause_seconds_bucket', SETS))}))",
            size=Size(10, 9),
        ),
        curve(
            "Updates",
            "Mean seconds that each update ran, on all hosts, since the exporter's start.",
            Ask(
                f"max by (update) ({of('caesura_update_seconds_sum', SCRAPED)} "
                f"/ {of('caesura_update_seconds_count', SCRAPED)})",
                "{{update}}",
            ),
            size=Size(12, 8),
            unit="s",
        ),
        curve(
            "Added to updates by Caesura",
            "Mean seconds of a pause that were not the update's own, on all hosts, since the exporter's start.",
            Ask(
                f"max ({of('caesura_operation_overhead_seconds_sum', SCRAPED)} "
                f"/ {of('caesura_operation_overhead_seconds_count', SCRAPED)})",
                "added",
            ),
            size=Size(12, 8),
            unit="s",
        ),
    ]


def _guests() -> list[Panel]:
    def error(when: str) -> str:
        return (
            f"max by (set, update_domain) ({of('caesura_clock_error_last_seconds', SETS, is_('when', when))})"
        )

    bound = f"max by (set) ({of('caesura_rollout_clock_bound_seconds', SETS)})"
    return [
        curve(
            "Guest clocks before the sync",
            "Guest minus host clock when the VM ran again, for the VM of the domain with the largest error. "
            "About the length of the pause, negative. The clock of a process guest is simulated.",
            Ask(error("before"), _BY_DOMAIN),
            size=Size(8, 8),
            unit="s",
            least=None,
            link=link_to_domain(*OF_SERIES),
        ),
        curve(
            "Guest clocks after the sync",
            "The same after the guest's clock was corrected, and the bound of the set's rollout. "
            "The clock of a process guest is simulated.",
            Ask(error("after"), _BY_DOMAIN),
            Ask(bound, "bound of {{set}}"),
            size=Size(8, 8),
            unit="s",
            least=None,
            limits="/^bound of/",
            link=link_to_domain(*OF_SERIES),
        ),
        number(
            "Notice and approval",
            "Means since the exporter's start: from an event's publication to its NotBefore, and to a workload's "
            "approval where one was given.",
            *(
                Ask(
                    f"max by (type) ({of(f'caesura_event_{metric}_seconds_sum', SCRAPED)} "
                    f"/ {of(f'caesura_event_{metric}_seconds_count', SCRAPED)})",
                    f"{name}, {{{{type}}}}",
                )
                for metric, name in (("notice", "notice"), ("approval_delay", "approved after"))
            ),
            size=Size(8, 8),
            unit="s",
        ),
    ]


def overview() -> Dashboard:
    """The dashboard that an operator opens first."""
    return page(
        "Maintenance overview",
        "caesura-overview",
        "Is a VM paused now? Does a rollout run? Did a pause take too long?",
        [
            *scrape_choices("caesura_exporter_build_info"),
            choice("set", "Set", "caesura_vms", SCRAPED, several=True, description="Availability sets."),
        ],
        [
            ("", _now()),
            ("Rollout", _rollout()),
            ("Pauses", _pauses()),
            ("Guests and workloads", _guests()),
        ],
        wave_marks(SETS),
    )
