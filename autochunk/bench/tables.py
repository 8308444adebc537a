"""Tables: the results as text."""

from __future__ import annotations

from collections.abc import Sequence

from tabulate import tabulate

from autochunk.bench.losses import LOSSES
from autochunk.bench.memory import MIB
from autochunk.bench.methods import METHODS, why_not
from autochunk.bench.results import BreakingPoint, Results
from autochunk.bench.summary import Summary, point_ratios, summarize


def results_table(results: Results, pareto: bool = False) -> str:
    """All that was measured, one table per case."""
    parts = []
    for case in results.cases():
        parts.append(f"{case.title}\n{_case_table(summarize(results.of(case)), pareto)}")
    if results.points:
        parts.append(_points_table(results.points))
    return "\n\n".join(parts)


def _case_table(summaries: Sequence[Summary], pareto: bool) -> str:
    medians = [s.median_seconds for s in summaries if s.median_seconds is not None]
    unit, scale = ("ms", 1e3) if medians and min(medians) < 1 else ("s", 1.0)
    columns = {
        "method": [str(s.row.variant) for s in summaries],
        f"median\n{unit}": [_number(s.median_seconds, scale) for s in summaries],
        f"least – most\n{unit}": [_spread(s, scale) for s in summaries],
        "time ÷\nunchunked": [_ratio(s.time_ratio) for s in summaries],
        "time ÷\nfloor": [_ratio(s.floor_ratio) for s in summaries],
        "peak\nMiB more": [_mebibytes(s.additional_bytes) for s in summaries],
        "peak\nMiB total": [_mebibytes(s.total_bytes) for s in summaries],
        "memory ÷\nunchunked": [_ratio(s.memory_ratio) for s in summaries],
    }
    if any(s.row.errors for s in summaries):
        for name in ("loss", "dx", "dw"):
            columns[f"error\nof {name}"] = [_error(s.row.errors.get(name)) for s in summaries]
    elif any(s.row.loss is not None for s in summaries):
        columns["loss"] = ["" if s.row.loss is None else f"{s.row.loss:.5f}" for s in summaries]
    if pareto:
        columns["Pareto"] = [_pareto(s) for s in summaries]
    kept = {name: values for name, values in columns.items() if any(values)}
    kept["remarks"] = [_remarks(s) for s in summaries]
    align = ["left", *["right"] * (len(kept) - 2), "left"]
    return tabulate(kept, headers="keys", disable_numparse=True, colalign=align)


def _remarks(summary: Summary) -> str:
    row = summary.row
    said = [] if row.status == "measured" else [f"{row.status.upper()}: {row.reason}"]
    if row.status == "unavailable":
        said = [row.reason]
    if summary.is_baseline:
        said.append("fastest unchunked")
    said.append(row.note)
    return "; ".join(filter(None, said))


def _pareto(summary: Summary) -> str:
    if summary.median_seconds is None or summary.additional_bytes is None:
        return ""
    return f"worse than {summary.dominated_by}" if summary.dominated_by else "on the curve"


def _points_table(points: Sequence[BreakingPoint]) -> str:
    ratios = point_ratios(points)
    first = points[0]
    rows = []
    for point, relative in zip(points, ratios, strict=True):
        found = point.found
        sizes = {"tokens": "vocabulary", "vocabulary": "tokens"}[point.dimension]
        case = point.case
        fixed = f"{getattr(case, sizes)} {sizes}, {case.hidden} hidden, {case.dtype}, {case.loss}"
        largest, remark = "", point.reason
        if found is not None:
            largest = str(found.largest) if found.largest or not found.failure else ""
            if found.failure:
                remark = f"FAILED {found.failure}"
            elif found.too_large is None:
                remark = "fits; more was not tried"
            elif not found.largest:
                remark = f"not even {found.too_large}"
            else:
                remark = next((p.reason for p in found.probes if p.size == found.largest), "")
        rows.append([fixed, str(point.variant), largest, _ratio(relative), remark])
    limit = "all memory" if first.limit_bytes is None else f"{first.limit_bytes / MIB:g} MiB"
    headers = ["case", "method", f"largest\n{first.dimension}", "÷ inductor", "remarks"]
    align = ("left", "left", "right", "right", "left")
    title = f"Largest {first.dimension} within {limit}, to within {first.granularity}"
    table = tabulate(rows, headers, disable_numparse=True, colalign=align)
    return f"{title} ({first.case.device})\n{table}"


def listing(device: str) -> str:
    """Methods and losses with what they can do here."""
    methods = []
    for name, method in METHODS.items():
        loss = (method.losses or ("cross_entropy",))[0]
        state = why_not(name, loss, device) or "ready"
        losses = ", ".join(method.losses) if method.losses else "any"
        methods.append([name, method.meaning, losses, ", ".join(method.options), state])
    headers = ["method", "what it is", "losses", "options", f"on {device}"]
    widths = [None, 40, 30, 30, 30]
    found = tabulate(methods, headers, maxcolwidths=widths)
    return f"{found}\n\nlosses: {', '.join(LOSSES)}"


def _number(value: float | None, scale: float) -> str:
    """Three significant digits, and no fewer than the integer ones."""
    if value is None:
        return ""
    scaled = value * scale
    decimals = 0 if scaled >= 100 else 1 if scaled >= 10 else 2 if scaled >= 1 else 3
    return f"{scaled:.{decimals}f}"


def _spread(summary: Summary, scale: float) -> str:
    if summary.least_seconds is None:
        return ""
    low, high = (_number(v, scale) for v in (summary.least_seconds, summary.most_seconds))
    return f"{low} – {high}"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _mebibytes(value: int | None) -> str:
    return (
        "" if value is None else f"{value / MIB:.0f}" if value >= 10 * MIB else f"{value / MIB:.1f}"
    )


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"
