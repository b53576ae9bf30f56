"""The report of selfcheck: its tables for the terminal and as Markdown, its verdict, and what it proves."""

import io
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jaxnorm.gpu.devices import KernelKind

EDITION = 3
STAGES = ("numbers", "races", "times")
ALL_RIGHT = "all right"
_FINE = ("right", "done", "not run")

Report = dict[str, Any]


def publish(report: Report, json_file: str | None, markdown_file: str | None) -> int:
    """Prints the tables and the verdict, writes the files, and returns the exit status."""
    report["verdict"] = verdict(report)
    lines = _last_lines(report)
    console = Console()
    for table in _tables(report):
        console.print(table)
    for line in lines:
        console.print(line, highlight=False, markup=False)
    if json_file is not None:
        Path(json_file).write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    if markdown_file is not None:
        Path(markdown_file).write_text(markdown(report, lines))
    return int(any(row["outcome"] not in _FINE for row in _rows(report, *STAGES)))


def verdict(report: Report) -> str:
    """Whether all rows of numbers and races are right, otherwise how many are not."""
    outcomes = Counter(row["outcome"] for row in _rows(report, "numbers", "races"))
    right = outcomes.pop("right", 0)
    if set(outcomes) - {"not run"}:
        return _counted(outcomes)
    return ", ".join([ALL_RIGHT if right else "nothing was run", *[_counted(outcomes)] * (outcomes.total() > 0)])


def proven(report: Report) -> set[KernelKind]:
    """What a whole report on a GPU found right in numbers and in races; nothing if any row is not right."""
    gpu = report["machine"]["gpu"]
    if report["selfcheck"] != EDITION or report["quick"] or gpu is None or verdict(report) != ALL_RIGHT:
        return set()
    capability = tuple(gpu["compute_capability"])
    by_stage = []
    for stage in ("numbers", "races"):
        # A row proves a kind if both passes are of that kind.
        kinds = [{tuple(kind) for kind in row["kinds"]} for row in report[stage]]
        by_stage.append({KernelKind(capability, *of_row.pop()) for of_row in kinds if len(of_row) == 1})
    return by_stage[0] & by_stage[1]


def markdown(report: Report, lines: list[str]) -> str:
    """A title, a paragraph for each of the lines, the facts of the machine, and the tables."""
    # Nothing is cut or wrapped at this width.
    console = Console(width=1000, file=io.StringIO(), color_system=None)
    head = [f"# jaxnorm selfcheck on {report['machine']['device']}", *lines]
    head += [f"* {name}: {value}" for name, value in report["machine"].items()]
    with console.capture() as written:
        for line in head:
            console.print(line + "\n", highlight=False, markup=False)
        for table in _tables(report):
            table.box, table.title_justify = box.MARKDOWN, "left"
            console.print(table)
            console.print()
    return "\n".join(line.strip() for line in written.get().splitlines()) + "\n"


def _rows(report: Report, *stages: str) -> list[dict[str, Any]]:
    return [row for stage in stages for row in report[stage]]


def _counted(outcomes: Counter[str]) -> str:
    return ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))


def _last_lines(report: Report) -> list[str]:
    rows = _rows(report, *STAGES)
    outcomes = Counter(row["outcome"] for row in rows if row["outcome"] != "not run")
    lines = [f"{_counted(outcomes) or 'nothing'} in {report['seconds']} s, seed {report['seed']}"]
    not_run = Counter(row["reason"] for row in rows if row["outcome"] == "not run")
    lines += ["not run: " + ", ".join(f"{count} ({reason})" for reason, count in not_run.items())] * bool(not_run)
    lines += [f"numbers and races: {report['verdict']}"]
    return lines + [f"proven, for jaxnorm/gpu/devices.py: {tuple(kind)}" for kind in sorted(proven(report))]


def _tables(report: Report) -> list[Table]:
    """Those that have rows, without the rows that were not run."""
    found = []
    for stage in STAGES:
        rows = [row for row in report[stage] if row["outcome"] != "not run"]
        if rows:
            found.append(_times(rows) if stage == "times" else _checks(stage, rows))
    return found


def _checks(stage: str, rows: list[dict[str, Any]]) -> Table:
    title = {"numbers": "numbers against float64", "races": "the same bits again and again"}[stage]
    table = Table("case", "kind", "closest to its limit", "outcome", title=title)
    for row in rows:
        table.add_row(row["case"], row["kind"], _closest(row.get("results", {})), _outcome(row))
    return table


def _times(rows: list[dict[str, Any]]) -> Table:
    table = Table("case", "pass", "contender", "µs", "low to high", "GB/s", "of a copy", title="time per call")
    for row in rows:
        for time in row.get("times", []):
            table.add_row(
                time["case"],
                time["pass"],
                time["contender"],
                f"{time['seconds'] * 1e6:.1f}",
                f"{time['low'] * 1e6:.1f} to {time['high'] * 1e6:.1f}",
                f"{time['bytes per second'] / 1e9:.0f}",
                f"{time['share of copy']:.0%}",
            )
        if "times" not in row:
            table.add_row(row["case"], "", _outcome(row))
    return table


def _closest(results: dict[str, Any]) -> str:
    """The error that is the largest share of its limit."""
    if not results:
        return ""
    shares = {name: float(result["error"]) / result["limit"] for name, result in results.items()}
    # A NaN is the worst.
    worst = max(shares, key=lambda name: (math.isnan(shares[name]), shares[name]))
    return f"{worst}: {float(results[worst]['error']):.1e} of {results[worst]['limit']:.1e}"


def _outcome(row: dict[str, Any]) -> str:
    outcome = row["outcome"] if row["outcome"] in _FINE else row["outcome"].upper()
    return escape(f"{outcome}: {row['reason']}") if row.get("reason") else outcome
