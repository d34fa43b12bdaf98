"""Assembles a dashboard: variables, annotations, links, rows of panels, and what the SDK leaves out."""

from __future__ import annotations

from collections.abc import Sequence

from grafana.generate.panels import SOURCE, Panel
from grafana.generate.queries import SCRAPED, of
from grafana_foundation_sdk.builders import dashboard
from grafana_foundation_sdk.models import dashboard as dm

TAG = "caesura"
DOMAIN_UID = "caesura-update-domain"


def link_to_domain(set_label: str, domain_label: str) -> dashboard.DashboardLink:
    """From a series or a table row to the dashboard of its domain, with the time range kept."""
    # Percent-encoded: a label's value is data.
    return (
        dashboard.DashboardLink("This update domain")
        .type(dm.DashboardLinkType.LINK)
        .url(
            f"/d/{DOMAIN_UID}?var-datasource=${{datasource}}&var-fleet=${{fleet:percentencode}}"
            f"&var-set=${{{set_label}:percentencode}}&var-update_domain=${{{domain_label}:percentencode}}"
            "&${__url_time_range}"
        )
    )


OF_SERIES = ("__field.labels.set", "__field.labels.update_domain")
OF_ROW = ("__data.fields.Set", "__data.fields.Domain")


def data_source() -> dashboard.DatasourceVariable:
    """Which Prometheus."""
    return dashboard.DatasourceVariable("datasource").label("Data Source").type("prometheus")


def choice(
    name: str,
    label: str,
    metric: str,
    matchers: Sequence[str] = (),
    *,
    several: bool,
    description: str,
) -> dashboard.QueryVariable:
    """Values of a label of a metric to choose from; all of them by default, if several can be chosen.

    "All" matches every value, not only the listed ones.
    """
    asked = f"{metric}{{{', '.join(matchers)}}}" if matchers else metric
    query = f"label_values({asked}, {name})"
    variable = (
        dashboard.QueryVariable(name)
        .label(label)
        .description(description)
        .datasource(SOURCE)
        .query({"qryType": 1, "query": query, "refId": f"variable-{name}"})
        .definition(query)
        .refresh(dm.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(dm.VariableSort.NATURAL_ASC)
        .multi(several)
        .include_all(several)
    )
    if several:
        variable.current(dm.VariableOption(text=["All"], value=["$__all"], selected=True))
        variable.all_value(".+")
    return variable


def scrape_choices(metric: str, *matchers: str) -> list[dashboard.QueryVariable]:
    """``fleet``, and ``job`` and ``instance`` from a metric."""
    of_job = (*matchers, 'job=~"$job"')
    return [
        # One at a time: sets of two fleets may have the same name.
        choice("fleet", "Fleet", "caesura_bus_connected", several=False, description="Fleet of hosts."),
        choice("job", "Job", metric, matchers, several=True, description="Prometheus job."),
        choice("instance", "Instance", metric, of_job, several=True, description="Scraped address."),
    ]


def wave_marks(scope: tuple[str, ...]) -> list[dashboard.AnnotationQuery]:
    """Wave starts, ends and halts. The metrics' values are the times at which they happened."""
    started = of("caesura_wave_started_timestamp_seconds", scope)
    ended = of("caesura_wave_ended_timestamp_seconds", scope, 'status="completed"')
    failed = of("caesura_wave_ended_timestamp_seconds", scope, 'status="failed"')
    halted = of("caesura_rollout_status", (*SCRAPED,), 'status="halted"')
    marks = (
        ("Wave starts", "yellow", started),
        ("Wave ends", "green", ended),
        ("Halts", "red", f"({failed} and on (set) {halted} == 1)"),
    )
    return [
        dashboard.AnnotationQuery()
        .name(name)
        .datasource(SOURCE)
        .enable(True)
        .icon_color(colour)
        .expr(f"max by (set, update_domain) ({expr}) * 1000")
        .use_value_for_time(True)
        .title_format(f"{name}: {{{{set}}}}, domain {{{{update_domain}}}}")
        .tag_keys("set,update_domain")
        .step("5s")
        for name, colour, expr in marks
    ]


def page(
    title: str,
    uid: str,
    description: str,
    variables: Sequence[dashboard.QueryVariable],
    groups: Sequence[tuple[str, Sequence[Panel]]],
    marks: Sequence[dashboard.AnnotationQuery] = (),
) -> dm.Dashboard:
    """A complete dashboard; a group with an empty heading has no row of its own."""
    made = (
        dashboard.Dashboard(title)
        .uid(uid)
        .description(description)
        .tags([TAG])
        .readonly()
        .refresh("10s")
        .time("now-30m", "now")
        .timezone("browser")
        .tooltip(dm.DashboardCursorSync.CROSSHAIR)
        .with_variable(data_source())
    )
    for variable in variables:
        made.with_variable(variable)
    for mark in marks:
        made.annotation(mark)
    made.link(
        dashboard.DashboardLink("Caesura")
        .type(dm.DashboardLinkType.DASHBOARDS)
        .tags([TAG])
        .as_dropdown(False)
        .keep_time(True)
        .include_vars(False)
    )
    for heading, panels in groups:
        if heading:
            made.with_row(dashboard.Row(heading))
        for panel in panels:
            made.with_panel(panel)
    built = made.build()
    # The SDK does not assign ids; Grafana would assign new ones on every load.
    for number, each in enumerate(built.panels or (), start=1):
        each.id_val = number
    return built
