"""The pictures of the benchmarks."""

import pathlib
import textwrap
from typing import Any

from matplotlib.figure import Figure


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
