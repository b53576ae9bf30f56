"""The pictures of the benchmarks."""

import pathlib
import textwrap
from typing import Any

from matplotlib.figure import Figure


def draw_speeds(results: list[Any], file: pathlib.Path, title: str) -> None:
    """Speed beside Flax's default: a row of panels per pass, a column per dtype and layout.

    Args:
      results: of compare.py.
      file: the picture.
      title: the machine, the versions and the date.
    """
    shapes = list(dict.fromkeys(r.case.name for r in results))
    passes = list(dict.fromkeys(r.case.pass_name for r in results))
    columns = list(dict.fromkeys((r.case.dtype, r.case.layout) for r in results))
    names = [name for name in dict.fromkeys(r.contender for r in results) if name != "flax"]
    figure = Figure(figsize=(2 + 3.6 * len(columns), 2 + 0.35 * len(shapes) * len(passes)), layout="constrained")
    panels = figure.subplots(len(passes), len(columns), sharex=True, sharey=True, squeeze=False)
    for i, pass_name in enumerate(passes):
        for j, column in enumerate(columns):
            panel = panels[i, j]
            panel.axvline(1, color="black", linewidth=0.8)
            panel.grid(axis="both", which="both", linewidth=0.3)
            panel.set_title(f"{pass_name}, {', '.join(column)}", fontsize="medium")
            for k, name in enumerate(names):
                chosen = [
                    r
                    for r in results
                    if (r.case.pass_name, (r.case.dtype, r.case.layout), r.contender) == (pass_name, column, name)
                ]
                _dots(panel, chosen, shapes, name, offset=0.6 * (k / max(1, len(names) - 1) - 0.5), color=f"C{k}")
    panels[0, 0].set_xscale("log", base=2)
    panels[0, 0].xaxis.set_major_formatter("{x:g}")
    panels[0, 0].set_yticks(range(len(shapes)), shapes)
    panels[0, 0].invert_yaxis()
    handles = {name: handle for p in panels.flat for handle, name in zip(*p.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=len(handles))
    figure.suptitle(
        "relu(norm(x)): speed in multiples of flax.linen.InstanceNorm (default), median and quartiles over rounds; "
        f"right of the line is faster\n{title}",
        fontsize="small",
    )
    figure.savefig(file, dpi=110)


def _dots(panel: Any, results: list[Any], shapes: list[str], name: str, *, offset: float, color: str) -> None:
    if not results:
        return
    middle = [r.speed.median for r in results]
    around = [[r.speed.median - r.speed.low for r in results], [r.speed.high - r.speed.median for r in results]]
    heights = [shapes.index(r.case.name) + offset for r in results]
    # jaxnorm stands out.
    size = 7 if name.startswith("jaxnorm") else 4
    panel.errorbar(middle, heights, xerr=around, fmt="o", markersize=size, color=color, label=name, linewidth=1)


def draw_growth(points: list[Any], file: pathlib.Path, title: str) -> None:
    """Time per element and bytes moved against the size: a column of panels per sweep.

    Args:
      points: of growth.py.
      file: the picture.
      title: the machine, the versions and the date.
    """
    sweeps = list(dict.fromkeys(point.sweep for point in points))
    quantities = {"nanoseconds": "ns per element", "moved": "moved, in sizes of x"}
    if points[0].moved_on_h100 is not None:
        quantities["moved_on_h100"] = "moved on an H100, in sizes of x"
    figure = Figure(figsize=(1.5 + 4 * max(2, len(sweeps)), 1.5 + 2.6 * len(quantities)), layout="constrained")
    panels = figure.subplots(len(quantities), len(sweeps), sharex="col", squeeze=False)
    kinds = list(dict.fromkeys((point.contender, point.pass_name) for point in points))
    for j, sweep in enumerate(sweeps):
        for i, (quantity, label) in enumerate(quantities.items()):
            panel = panels[i, j]
            for contender, pass_name in kinds:
                line = [p for p in points if (p.sweep, p.contender, p.pass_name) == (sweep, contender, pass_name)]
                if quantity == "nanoseconds":
                    line = [p for p in line if p.is_judged]
                panel.plot(
                    [p.size for p in line],
                    [p.nanoseconds.median if quantity == "nanoseconds" else getattr(p, quantity) for p in line],
                    marker=".",
                    linestyle="-" if pass_name == "step" else ":",
                    color="C0" if contender == "jaxnorm" else "C1",
                    label=f"{contender}, {pass_name}",
                )
            panel.set_xscale("log", base=2)
            panel.set_ylim(bottom=0)
            panel.grid(linewidth=0.3)
            panel.set_ylabel(label)
        circled = [p for p in points if p.sweep == sweep and p.is_cliff]
        panels[0, j].plot(
            [p.size for p in circled],
            [p.nanoseconds.median for p in circled],
            "o",
            mfc="none",
            color="red",
            label="cliff",
        )
        panels[0, j].set_title(sweep)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(kinds) + 1)
    figure.suptitle(textwrap.fill(title, 120), fontsize="small")
    figure.savefig(file, dpi=110)
