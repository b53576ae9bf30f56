"""The report of selfcheck as tables, for the terminal and as Markdown."""

import io
import math
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table


def tables(report: dict[str, Any]) -> list[Table]:
    """Those that have rows."""
    stages = {"numbers": _numbers, "races": _races, "times": _times, "sweep": _sweep}
    return [make(report[stage]) for stage, make in stages.items() if report[stage]]


def markdown(report: dict[str, Any], head: list[str]) -> str:
    """The head, a paragraph for each line, and the tables."""
    # Wide enough that nothing is cut or wrapped.
    console = Console(width=1000, file=io.StringIO(), color_system=None)
    with console.capture() as written:
        for line in head:
            console.print(line + "\n", highlight=False, markup=False)
        for table in tables(report):
            table.box, table.title_justify = box.MARKDOWN, "left"
            console.print(table)
            console.print()
    return "\n".join(line.strip() for line in written.get().splitlines()) + "\n"


def machine(facts: dict[str, Any]) -> Group:
    """A line for each fact."""
    return Group(*(f"{name}: {value}" for name, value in facts.items()))


def _numbers(rows: list[dict[str, Any]]) -> Table:
    """The result that comes closest to what its error may be."""
    table = Table("case", "way", "closest to its limit", "outcome", title="numbers against float64")
    for row in rows:
        table.add_row(row["case"], row["way"], _closest(row.get("results", {})), _outcome(row))
    return table


def _races(rows: list[dict[str, Any]]) -> Table:
    table = Table("case", "way", "differing of", "closest to its limit", "outcome", title="races")
    for row in rows:
        differing = ", ".join(f"{count} beside {beside}" for beside, count in row.get("differing", {}).items())
        of = f"{differing} of {row['repeats']}" if differing else ""
        table.add_row(row["case"], row["way"], of, _closest(row.get("results", {})), _outcome(row))
    return table


def _times(rows: list[dict[str, Any]]) -> Table:
    table = Table("case", "pass", "contender", "µs", "low to high", "GB/s", "of a copy", "clock", title="time per call")
    for row in rows:
        for time in row.get("times", []):
            table.add_row(
                f"{time['case']}, {time['activation']}",
                time["pass"],
                time["contender"],
                f"{time['seconds'] * 1e6:.1f}",
                f"{time['low'] * 1e6:.1f} to {time['high'] * 1e6:.1f}",
                f"{time['bytes per second'] / 1e9:.0f}",
                f"{time['share of copy']:.0%}",
                time["clock"],
            )
        if "times" not in row:
            table.add_row(f"{row['case']}, {row['activation']}", "", _outcome(row))
    return table


def _sweep(rows: list[dict[str, Any]]) -> Table:
    table = Table("case", "pass", "tile", "chosen", "µs", "of a copy", title="tiles (ReLU)")
    for row in rows:
        microseconds, share = "", _outcome(row)
        if "seconds" in row:
            microseconds, share = f"{row['seconds'] * 1e6:.1f}", f"{row['share of copy']:.0%}"
        table.add_row(row["case"], row["pass"], row["tile"], "yes" if row["chosen"] else "", microseconds, share)
    return table


def _closest(results: dict[str, Any]) -> str:
    """Of the errors, the largest share of what it may be."""
    if not results:
        return ""
    shares = {name: float(result["error"]) / result["tolerance"] for name, result in results.items()}
    # A NaN is the worst.
    worst = max(shares, key=lambda name: (math.isnan(shares[name]), shares[name]))
    return f"{worst}: {float(results[worst]['error']):.1e} of {results[worst]['tolerance']:.1e}"


def _outcome(row: dict[str, Any]) -> str:
    outcome, reason = row["outcome"], row.get("reason")
    shown = outcome if outcome in ("right", "done", "not run") else outcome.upper()
    return escape(f"{shown}: {reason}") if reason else shown
