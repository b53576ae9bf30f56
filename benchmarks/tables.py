"""The report of compare.py in Markdown."""

from collections.abc import Callable
from typing import Any

from contenders import BASELINE
from report import describe, table
from turns import geometric_mean

TITLES = {"forward": "Forward", "step": "Training step (y, dx, dgamma, dbeta)"}
MUST_MOVE = {"forward": "x in, y out", "step": "x in, y out; x and dy in, dx out"}


def report(results: list[Any], facts: dict[str, Any]) -> str:
    """All tables.

    Args:
      results: of compare.py.
      facts: of the machine.
    """
    torch = f"PyTorch has {facts['torch threads']} threads. " if "torch threads" in facts else ""
    parts = [
        "# relu(norm(x)) beside what people use",
        f"{describe(facts)}. {torch}JAX has one thread per core.",
        "Contenders took turns; a ratio is the median over rounds of the ratio within a round.",
        "## How many times as fast jaxnorm is\n\n"
        "Geometric mean over the shapes and layouts that the other one has (lowest to highest).",
        _summary(results),
    ]
    for pass_name, dtype in _kinds(results):
        chosen = [r for r in results if (r.case.pass_name, r.case.dtype) == (pass_name, dtype)]
        parts += [
            f"## {TITLES[pass_name]}, {dtype}",
            "Speed in multiples of Flax's default: median (quartiles). Larger is faster.",
            _speeds(chosen),
            f"Time; bytes that must move ({MUST_MOVE[pass_name]}) per second; share of what a copy of x moves per "
            "second, in the same round.",
            _rates(chosen),
        ]
    return "\n\n".join(parts)


def _kinds(results: list[Any]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((r.case.pass_name, r.case.dtype) for r in results))


def _names(results: list[Any], without: str | None = None) -> list[str]:
    return [name for name in dict.fromkeys(r.contender for r in results) if name != without]


def _summary(results: list[Any]) -> str:
    kinds = _kinds(results)

    def cell(name: str, kind: tuple[str, str]) -> str:
        values = [r.behind.median for r in results if r.contender == name and (r.case.pass_name, r.case.dtype) == kind]
        return f"{geometric_mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"

    lines = [[f"than {name}", *(cell(name, kind) for kind in kinds)] for name in _names(results, "jaxnorm")]
    return table(["", *(", ".join(kind) for kind in kinds)], lines)


def _speeds(results: list[Any]) -> str:
    names = _names(results, BASELINE)
    lines = _lines(results, names, lambda r: str(r.speed))
    means = (geometric_mean([r.speed.median for r in results if r.contender == name]) for name in names)
    return table(["", *names], [*lines, ["geometric mean", *(f"{mean:.2f}" for mean in means)]])


def _rates(results: list[Any]) -> str:
    names = _names(results)

    def cell(r: Any) -> str:
        return f"{r.seconds.median * 1e3:.3g} ms, {r.bytes_per_second / 1e9:.3g} GB/s, {r.share_of_copy:.0f} %"

    return table(["", *names], _lines(results, names, cell))


def _lines(results: list[Any], names: list[str], cell: Callable[[Any], str]) -> list[list[str]]:
    """A line per array, a cell per contender, empty where it does not have the layout."""
    lines: dict[str, dict[str, str]] = {}
    for r in results:
        lines.setdefault(f"{r.case.name}, {r.case.layout} {r.case.array}", {})[r.contender] = cell(r)
    return [[label, *(cells.get(name, "") for name in names)] for label, cells in lines.items()]
