"""The dashboards' queries: metrics of the exporter with their matchers, and the few longer expressions."""

from __future__ import annotations

_TARGETS = ('job=~"$job"', 'instance=~"$instance"')
"""Matchers that every query carries, as Grafana's linter requires: they select among several exporters."""
SCRAPED = (*_TARGETS, 'fleet="$fleet"')
"""For metrics of services, which have the name of their fleet."""
OURS = (*_TARGETS, 'job=~"caesura-.+"')
"""For metrics that Prometheus has of every target: not all jobs belong to Caesura, and none says its fleet."""
SETS = (*SCRAPED, 'set=~"$set"')
DOMAIN = (*SCRAPED, 'set="$set"', 'update_domain="$update_domain"')

# By the number that caesura_domain_wave_status gives them (none: 0), with the colours of the timeline.
STATES = (
    ("no rollout", "#9ca3af"),
    ("pending", "#6b7280"),
    ("scheduled", "blue"),
    ("started", "yellow"),
    ("verifying", "purple"),
    ("soaking", "super-light-blue"),
    ("completed", "green"),
    ("failed", "red"),
    ("cancelled", "#a16207"),
)
PAUSED_FROM = 10
"""Added to a state's number while a VM of the domain is paused."""


def of(metric: str, scope: tuple[str, ...], *matchers: str) -> str:
    """``metric{...}`` with the matchers of a scope and its own."""
    return f"{metric}{{{', '.join((*scope, *matchers))}}}"


def is_(label: str, value: str) -> str:
    """A matcher."""
    return f'{label}="{value}"'


def domain_states(scope: tuple[str, ...]) -> str:
    """The number of each domain's state, ``PAUSED_FROM`` more while a VM of it is paused."""
    states = of("caesura_domain_wave_status", scope)
    # A point may cover minutes, with a whole pause in them; or less than a scrape interval, and then has no sample of its own.
    vms = of("caesura_vms", scope, is_("state", "paused"))
    paused = f"((max_over_time({vms}[$__interval]) or {vms}) > bool 0) * {PAUSED_FROM}"
    every = f"{states}\n    or {paused}"
    # Summed within one exporter: its series of one domain differ by status and state.
    return (
        f"max by (set, update_domain) (\n  sum by (set, update_domain, job, instance) (\n    {every}\n  )\n)"
    )


def new_in_window(bucket: str) -> str:
    """The growth of each bucket; a new bucket counts with its whole value, or its first pause would be lost.

    New means absent in the hour before: after a few failed scrapes, the pauses since the exporter's start are not new.
    """
    before = f"last_over_time({bucket}[1h] offset $__rate_interval)"
    return f"(({bucket} unless {before}) or increase({bucket}[$__rate_interval]))"


def quantile_of_all(q: float, bucket: str, longest: str) -> str:
    """A quantile of all pauses that the exporter has received since its start; at most the longest of them."""
    estimate = f"histogram_quantile({q:g}, max by (le) (sum by (le, job, instance) ({bucket})))"
    return f"clamp_max({estimate}, scalar(max({longest})))"
