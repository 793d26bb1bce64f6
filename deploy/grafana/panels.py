"""What the dashboards are made of: queries of the chosen engines, panels, and a frame for them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from grafana_foundation_sdk.builders import barchart, prometheus, stat, timeseries
from grafana_foundation_sdk.builders.common import ReduceDataOptions, VizLegendOptions
from grafana_foundation_sdk.builders.dashboard import (
    Dashboard,
    DatasourceVariable,
    QueryVariable,
    Row,
)
from grafana_foundation_sdk.models.common import LegendDisplayMode, LegendPlacement
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DataSourceRef,
    DataTransformerConfig,
    VariableOption,
    VariableRefresh,
    VariableSort,
)
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

TAG = "saqqara"
SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
ENGINES = 'job=~"$job", instance=~"$instance", model_name=~"$model"'
QUANTILES = (0.5, 0.9, 0.99)
WIDE, HALF, SMALL = 24, 12, 4  # of Grafana's 24 columns


def series(metric: str, matchers: str = "") -> str:
    """The selector of a metric's series on the engines that are chosen."""
    return f"{metric}{{{ENGINES}{', ' if matchers else ''}{matchers}}}"


def rate(metric: str, by: str = "", matchers: str = "") -> str:
    """A counter's increase per second, over all engines that are chosen."""
    return f"sum{_by(by)}(rate({series(metric, matchers)}[$__rate_interval]))"


def total(metric: str, by: str = "", matchers: str = "") -> str:
    """A gauge or counter, summed over the engines that are chosen."""
    return f"sum{_by(by)}({series(metric, matchers)})"


def or_zero(expression: str) -> str:
    """Zero where an engine is running and the event that is counted has never happened."""
    return f"{expression} or 0 * {total('vllm:num_requests_running')}"


def quantile(share: float, histogram: str) -> str:
    """A quantile of a histogram."""
    return f"histogram_quantile({share}, {rate(f'{histogram}_bucket', 'le')})"


def _by(labels: str) -> str:
    return f" by ({labels}) " if labels else ""


@dataclass(frozen=True, slots=True)
class Query:
    """One query of a panel, and the name of what it returns (`{{label}}` stands for a label)."""

    expression: str
    legend: str


def graph(title: str, description: str, unit: str, *queries: Query, span: int = HALF) -> Any:
    """Lines over time."""
    panel = timeseries.Panel().title(title).description(description).unit(unit).min(0)
    panel = panel.datasource(SOURCE).height(8).span(span).fill_opacity(8)
    panel = panel.legend(
        VizLegendOptions()
        .display_mode(LegendDisplayMode.LIST)
        .placement(LegendPlacement.BOTTOM)
        .show_legend(True)
        .calcs([])
    )
    for index, query in enumerate(queries):
        panel = panel.with_target(
            prometheus.Dataquery()
            .expr(query.expression)
            .legend_format(query.legend)
            .ref_id(_ref(index))
            .datasource(SOURCE)
        )
    return panel


def number(title: str, description: str, unit: str, expression: str) -> Any:
    """The latest value, large."""
    query = prometheus.Dataquery().expr(expression).ref_id("A").datasource(SOURCE)
    reduce = ReduceDataOptions().calcs(["lastNotNull"]).fields("").values(False)
    panel = stat.Panel().title(title).description(description).unit(unit).datasource(SOURCE)
    return panel.height(4).span(SMALL).reduce_options(reduce).with_target(query)


def bars_by_layer(title: str, description: str, unit: str, expression: str) -> Any:
    """One bar per layer, the lowest layer first; labels are text, so they are made numbers."""
    query = prometheus.Dataquery().expr(expression).ref_id("A").datasource(SOURCE)
    query = query.format(PromQueryFormat.TABLE).instant().legend_format("kept")
    number_of_layer = {"targetField": "layer", "destinationType": "number"}
    panel = barchart.Panel().title(title).description(description).unit(unit).datasource(SOURCE)
    panel = panel.height(9).span(WIDE).min(0).max(1).x_field("layer").with_target(query)
    for name, options in (
        ("convertFieldType", {"fields": {}, "conversions": [number_of_layer]}),
        ("sortBy", {"fields": {}, "sort": [{"field": "layer"}]}),
        ("organize", {"excludeByName": {"Time": True}, "renameByName": {"Value": "kept"}}),
    ):
        panel = panel.with_transformation(DataTransformerConfig(id_val=name, options=options))
    return panel


def _ref(index: int) -> str:
    return "ABCDEFGH"[index]


def quantiles(histogram: str) -> list[Query]:
    """The quantiles of a histogram that every latency panel shows."""
    return [Query(quantile(q, histogram), f"p{q * 100:.0f}") for q in QUANTILES]


def dashboard(
    name: str, title: str, description: str, rows: Sequence[tuple[str, list[Any]]]
) -> Any:
    """A dashboard of rows of panels, with the variables that all of them have."""
    board = (
        Dashboard(f"Saqqara / {title}")
        .uid(f"saqqara-{name}")
        .description(description)
        .tags([TAG])
        .time("now-1h", "now")
        .refresh("10s")
        .timezone("browser")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .with_variable(DatasourceVariable("datasource").label("data source").type("prometheus"))
    )
    running = "vllm:num_requests_running"
    for variable, label, query in (
        ("job", "job", f"label_values({running}, job)"),
        ("instance", "instance", f'label_values({running}{{job=~"$job"}}, instance)'),
        ("model", "model", f'label_values({running}{{job=~"$job"}}, model_name)'),
    ):
        board = board.with_variable(
            QueryVariable(variable)
            .label(label)
            .datasource(SOURCE)
            .query(query)
            .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
            .sort(VariableSort.ALPHABETICAL_ASC)
            .multi(True)
            .include_all(True)
            .all_value(".*")
            .current(VariableOption(text="All", value="$__all", selected=True))
        )
    for row, panels in rows:
        board = board.with_row(Row(row))
        for panel in panels:
            board = board.with_panel(panel)
    return board
