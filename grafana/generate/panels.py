"""The project's panel style: each panel has a description, a unit, ref ids, the templated data source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from grafana_foundation_sdk.builders import (
    bargauge,
    common,
    dashboard,
    heatmap,
    prometheus,
    stat,
    statetimeline,
    table,
    timeseries,
)
from grafana_foundation_sdk.models import common as cm
from grafana_foundation_sdk.models import dashboard as dm
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

SOURCE = cm.DataSourceRef(type_val="prometheus", uid="$datasource")

Panel: TypeAlias = (
    timeseries.Panel | stat.Panel | statetimeline.Panel | heatmap.Panel | table.Panel | bargauge.Panel
)


class Ask(NamedTuple):
    """A query and the name of its series."""

    expr: str
    legend: str = ""


class Size(NamedTuple):
    """Width in 24ths of the page, height in rows of 30 pixels."""

    width: int
    height: int


_SMALL = Size(4, 4)
_HALF = Size(12, 8)

Steps: TypeAlias = Sequence[tuple[float | None, str]]
"""(lower bound, colour), the first without a bound."""

FINE: Steps = ((None, "green"),)
NONE_WANTED: Steps = ((None, "green"), (1, "red"))


def _thresholds(steps: Steps) -> dashboard.ThresholdsConfig:
    return (
        dashboard.ThresholdsConfig()
        .mode(dm.ThresholdsMode.ABSOLUTE)
        .steps([dm.Threshold(value=value, color=colour) for value, colour in steps])
    )


def _begin(panel: Any, title: str, description: str, size: Size, unit: str) -> None:
    panel.title(title).description(description).datasource(SOURCE).unit(unit)
    panel.span(size.width).height(size.height)


def _ask(
    panel: Any, asks: Sequence[Ask], *, instant: bool = False, form: PromQueryFormat | None = None
) -> None:
    for number, ask in enumerate(asks):
        query = prometheus.Dataquery().expr(ask.expr).legend_format(ask.legend).ref_id(chr(ord("A") + number))
        query = query.datasource(SOURCE)
        query = query.instant() if instant else query.range()
        panel.with_target(query.format(form) if form else query)


def _legend(place: cm.LegendPlacement = cm.LegendPlacement.BOTTOM) -> common.VizLegendOptions:
    legend = common.VizLegendOptions().show_legend(True).display_mode(cm.LegendDisplayMode.LIST)
    return legend.placement(place).calcs([])


def named(values: Mapping[float, tuple[str, str]]) -> list[dm.ValueMapping]:
    """Values shown as a word in a colour."""
    return [
        dm.ValueMap(
            options={
                f"{value:g}": dm.ValueMappingResult(text=text, color=colour, index=index)
                for index, (value, (text, colour)) in enumerate(values.items())
            }
        )
    ]


def from_on(least: float, most: float, text: str, colour: str) -> dm.ValueMapping:
    """All values of a range shown as one word."""
    result = dm.ValueMappingResult(text=text, color=colour, index=100)
    return dm.RangeMap(options=dm.DashboardRangeMapOptions(from_val=least, to=most, result=result))


def number(
    title: str,
    description: str,
    *asks: Ask,
    size: Size = _SMALL,
    unit: str = "short",
    steps: Steps = FINE,
    words: Sequence[dm.ValueMapping] = (),
    nothing: str = "no data",
    decimals: int | None = None,
) -> stat.Panel:
    """One current number, never the last known one; ``nothing`` is shown if there is none."""
    panel = stat.Panel()
    _begin(panel, title, description, size, unit)
    _ask(panel, asks, instant=True)
    panel.thresholds(_thresholds(steps)).no_value(nothing).mappings(list(words))
    panel.color_scheme(dashboard.FieldColor().mode(dm.FieldColorModeId.THRESHOLDS))
    panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]).values(False).fields(""))
    panel.graph_mode(cm.BigValueGraphMode.NONE)
    panel.color_mode(cm.BigValueColorMode.VALUE).orientation(cm.VizOrientation.AUTO)
    several = len(asks) > 1 or any("{{" in ask.legend for ask in asks)
    panel.text_mode(cm.BigValueTextMode.VALUE_AND_NAME if several else cm.BigValueTextMode.VALUE)
    panel.justify_mode(cm.BigValueJustifyMode.AUTO)
    if decimals is not None:
        panel.decimals(decimals)
    return panel


def curve(
    title: str,
    description: str,
    *asks: Ask,
    size: Size = _HALF,
    unit: str = "short",
    limits: str = "",
    least: float | None = 0,
    stacked: bool = False,
    many: bool = False,
    colours: Mapping[str, str] | None = None,
    link: dashboard.DashboardLink | None = None,
) -> timeseries.Panel:
    """Lines over time. Series whose name matches the pattern ``limits`` are dashed red lines; with ``many`` series the
    legend is at the side.
    """
    panel = timeseries.Panel()
    _begin(panel, title, description, size, unit)
    _ask(panel, asks)
    panel.legend(_legend(cm.LegendPlacement.RIGHT if many else cm.LegendPlacement.BOTTOM))
    panel.tooltip(common.VizTooltipOptions().mode(cm.TooltipDisplayMode.MULTI).sort(cm.SortOrder.DESCENDING))
    panel.draw_style(cm.GraphDrawStyle.LINE).line_width(0 if stacked else 2).fill_opacity(
        60 if stacked else 0
    )
    # A value holds until the next scrape: there are no samples in between.
    panel.line_interpolation(cm.LineInterpolation.STEP_AFTER).show_points(cm.VisibilityMode.NEVER)
    panel.color_scheme(dashboard.FieldColor().mode(dm.FieldColorModeId.PALETTE_CLASSIC))
    panel.thresholds(_thresholds(FINE))
    if stacked:
        panel.stacking(common.StackingConfig().mode(cm.StackingMode.NORMAL).group("A"))
    if least is not None:
        panel.min(least)
    for name, colour in (colours or {}).items():
        fixed = {"mode": "fixed", "fixedColor": colour}
        panel.override_by_regexp(f"/^{name}$/", [dm.DynamicConfigValue(id_val="color", value=fixed)])
    if link is not None and not limits:
        panel.data_links([link])
    if limits and link is not None:  # a limit belongs to a set: it does not link to a domain
        made = link.build()
        every_other = f"/^(?!{limits.strip('/^')})/"
        links = dm.DynamicConfigValue(id_val="links", value=[{"title": made.title, "url": made.url}])
        panel.override_by_regexp(every_other, [links])
    if limits:
        panel.override_by_regexp(
            limits,
            [
                dm.DynamicConfigValue(id_val="color", value={"mode": "fixed", "fixedColor": "red"}),
                dm.DynamicConfigValue(id_val="custom.lineStyle", value={"fill": "dash", "dash": [8, 6]}),
                dm.DynamicConfigValue(id_val="custom.fillOpacity", value=0),
            ],
        )
    return panel


def timeline(
    title: str,
    description: str,
    *asks: Ask,
    size: Size,
    words: Sequence[dm.ValueMapping],
    link: dashboard.DashboardLink | None = None,
) -> statetimeline.Panel:
    """A lane per series, coloured by its state."""
    panel = statetimeline.Panel()
    _begin(panel, title, description, size, "none")
    _ask(panel, asks)
    panel.mappings(list(words)).thresholds(_thresholds(FINE))
    panel.color_scheme(dashboard.FieldColor().mode(dm.FieldColorModeId.THRESHOLDS))
    panel.merge_values(True).show_value(cm.VisibilityMode.AUTO).row_height(0.85).fill_opacity(80)
    panel.align_value(cm.TimelineValueAlignment.CENTER).line_width(0).legend(_legend())
    panel.tooltip(common.VizTooltipOptions().mode(cm.TooltipDisplayMode.SINGLE).sort(cm.SortOrder.NONE))
    if link is not None:
        panel.data_links([link])
    return panel


def heat(title: str, description: str, buckets: str, *, size: Size) -> heatmap.Panel:
    """Counts by bucket over time; ``buckets`` gives one series per ``le``."""
    panel = heatmap.Panel()
    _begin(panel, title, description, size, "short")
    _ask(panel, [Ask(buckets, "{{le}}")], form=PromQueryFormat.HEATMAP)
    panel.calculate(False).cell_gap(1).show_legend()
    panel.color(
        heatmap.HeatmapColorOptions()
        .mode(HeatmapColorMode.SCHEME)
        .scheme("Oranges")
        .steps(32)
        .exponent(0.5)
        .fill("dark-orange")
        .reverse(False)
    )
    panel.filter_values(heatmap.FilterValueRange().le(1e-9))
    panel.y_axis(heatmap.YAxisConfig().unit("s").axis_placement(cm.AxisPlacement.LEFT).reverse(False))
    panel.tooltip(heatmap.HeatmapTooltip().mode(cm.TooltipDisplayMode.SINGLE).y_histogram(True))
    return panel


def bars(
    title: str, description: str, *asks: Ask, size: Size, unit: str, most: float, steps: Steps = FINE
) -> bargauge.Panel:
    """A bar per series, full at ``most``."""
    panel = bargauge.Panel()
    _begin(panel, title, description, size, unit)
    _ask(panel, asks, instant=True)
    panel.min(0).max(most).thresholds(_thresholds(steps)).no_value("no data")
    panel.color_scheme(dashboard.FieldColor().mode(dm.FieldColorModeId.THRESHOLDS))
    panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]).values(False).fields(""))
    panel.orientation(cm.VizOrientation.HORIZONTAL).display_mode(cm.BarGaugeDisplayMode.BASIC)
    panel.show_unfilled(True).value_mode(cm.BarGaugeValueMode.COLOR)
    return panel


def rows(
    title: str,
    description: str,
    *asks: Ask,
    size: Size,
    columns: Mapping[str, str],
    unit: str = "short",
    nothing: str,
    link: dashboard.DashboardLink | None = None,
) -> table.Panel:
    """A table of the current state. ``columns``: maps a field to its heading, in order; other fields are left out."""
    panel = table.Panel()
    _begin(panel, title, description, size, unit)
    _ask(panel, asks, instant=True, form=PromQueryFormat.TABLE)
    panel.no_value(nothing).thresholds(_thresholds(FINE))
    panel.with_transformation(dm.DataTransformerConfig(id_val="merge", options={}))
    keep = {"include": {"names": list(columns)}}
    panel.with_transformation(dm.DataTransformerConfig(id_val="filterFieldsByName", options=keep))
    order = {
        "indexByName": {name: index for index, name in enumerate(columns)},
        "renameByName": dict(columns),
    }
    panel.with_transformation(dm.DataTransformerConfig(id_val="organize", options=order))
    if link is not None:
        panel.data_links([link])
    return panel
