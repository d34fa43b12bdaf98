"""*One update domain*: its state, its pauses, its clocks, its proofs."""

from __future__ import annotations

from grafana.generate.overview import STATE_WORDS
from grafana.generate.page import DOMAIN_UID, choice, page, scrape_choices, wave_marks
from grafana.generate.panels import NONE_WANTED, Ask, Panel, Size, curve, heat, number, timeline
from grafana.generate.queries import (
    DOMAIN,
    SCRAPED,
    domain_states,
    is_,
    new_in_window,
    of,
    quantile_of_all,
)
from grafana_foundation_sdk.models.dashboard import Dashboard

_BUCKETS = of("caesura_pause_seconds_bucket", DOMAIN)
_BUDGET = of("caesura_pause_budget_seconds", DOMAIN)
_LAST = of("caesura_pause_last_seconds", DOMAIN)
_LAST_BUDGET = of("caesura_pause_last_budget_seconds", DOMAIN)
_LONGEST = of("caesura_pause_longest_seconds", DOMAIN)


def _now() -> list[Panel]:
    return [
        number(
            "VMs paused now",
            "VMs of the domain that are paused at this moment.",
            Ask(f"max({of('caesura_vms', DOMAIN, is_('state', 'paused'))})"),
            steps=((None, "green"), (1, "orange")),
        ),
        number(
            "Longest of the last pauses",
            "The longest pause of the domain's last operation.",
            Ask(f"max({_LAST})"),
            unit="s",
        ),
        number(
            "Budget used",
            "The longest pause of the last operation as a part of its budget.",
            Ask(f"max({_LAST} / {_LAST_BUDGET})"),
            unit="percentunit",
            decimals=0,
            steps=((None, "green"), (0.8, "orange"), (1, "red")),
        ),
        number(
            "Pauses, typical and slowest",
            "Of all pauses since the exporter's start: quantiles, estimated from the histogram's buckets, and the longest.",
            Ask(quantile_of_all(0.5, _BUCKETS, _LONGEST), "p50"),
            Ask(quantile_of_all(0.95, _BUCKETS, _LONGEST), "p95"),
            Ask(quantile_of_all(0.99, _BUCKETS, _LONGEST), "p99"),
            Ask(f"max({_LONGEST})", "longest"),
            size=Size(6, 4),
            unit="s",
        ),
        number(
            "Beyond budget",
            "Pauses longer than their budget, since the exporter's start.",
            Ask(f"max(sum by (job, instance) ({of('caesura_pause_overruns_total', DOMAIN)}))"),
            size=Size(3, 4),
            steps=NONE_WANTED,
        ),
        number(
            "Resumed by the guard",
            "Pauses that the pause guard ended, since the exporter's start.",
            Ask(f"max(sum by (job, instance) ({of('caesura_pauses_resumed_by_guard_total', DOMAIN)}))"),
            size=Size(3, 4),
            steps=NONE_WANTED,
        ),
    ]


def _pauses() -> list[Panel]:
    return [
        timeline(
            "State",
            "The domain's state in its set's newest rollout, and when VMs of it were paused.",
            Ask(domain_states(DOMAIN), "{{set}} · {{update_domain}}"),
            size=Size(24, 4),
            words=STATE_WORDS,
        ),
        curve(
            "Pause seconds",
            "The longest pause of each host's last operation, how long VMs are paused now, by host, and the budget. "
            "A host is named only while a pause on it is open.",
            Ask(f"max by (method) ({_LAST})", "longest, {{method}}"),
            Ask(
                f"max by (host) ({of('caesura_host_pause_open_seconds', DOMAIN)})",
                "{{host}}, paused now",
            ),
            Ask(f"min by (set) ({_BUDGET})", "budget of {{set}}"),
            unit="s",
            limits="/^budget of/",
        ),
        heat(
            "How long pauses were",
            "Pauses by their length over time.",
            f"max by (le) (sum by (le, job, instance) ({new_in_window(_BUCKETS)}))",
            size=Size(12, 8),
        ),
        curve(
            "VMs by state",
            "All VMs of the domain, as reported by the hosts.",
            Ask(f"max by (state) ({of('caesura_vms', DOMAIN)})", "{{state}}"),
            size=Size(12, 8),
            stacked=True,
            colours={"paused": "orange", "running": "green", "stopped": "red", "unknown": "purple"},
        ),
    ]


def _guests() -> list[Panel]:
    def error(when: str) -> Ask:
        metric = of("caesura_clock_error_last_seconds", DOMAIN, is_("when", when))
        return Ask(f"max by (when) ({metric})", "{{when}} the sync")

    return [
        curve(
            "Guest clocks before the sync",
            "Guest minus host clock when the VM ran again, for the VM with the largest error. "
            "The clock of a process guest is simulated.",
            error("before"),
            size=Size(8, 8),
            unit="s",
            least=None,
        ),
        curve(
            "Guest clocks after the sync",
            "The same after the guest's clock was corrected. The clock of a process guest is simulated.",
            error("after"),
            size=Size(8, 8),
            unit="s",
            least=None,
        ),
        number(
            "Proofs of unchanged memory",
            "Digest equal, sampled digest equal, canary equal, not rebooted: number of checks since the exporter's start. "
            "`not_rebooted` alone does not prove that memory is unchanged. `broken` must never appear.",
            Ask(
                f"max by (proof, outcome) ({of('caesura_memory_proofs_total', DOMAIN)})",
                "{{proof}} {{outcome}}",
            ),
            size=Size(8, 8),
        ),
    ]


def domain() -> Dashboard:
    """The dashboard to which lanes and lines of the overview link."""
    return page(
        "One update domain",
        DOMAIN_UID,
        "One update domain of one availability set.",
        [
            *scrape_choices("caesura_exporter_build_info"),
            choice("set", "Set", "caesura_vms", SCRAPED, several=False, description="Availability set."),
            choice(
                "update_domain",
                "Domain",
                "caesura_vms",
                (*SCRAPED, 'set="$set"'),
                several=False,
                description="Update domain of the set.",
            ),
        ],
        [("", _now()), ("Pauses", _pauses()), ("Guests", _guests())],
        wave_marks(DOMAIN),
    )
