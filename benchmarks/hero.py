"""The first picture of the README: the error of y against the offset, and training steps of norm and ReLU.

    make bench
    python -m benchmarks.hero benchmarks/results/compare.json --plot benchmarks/results/hero.png

Errors are computed here. The times are those of the report of benchmarks.compare.
"""

import argparse
import json
import pathlib
import statistics
from typing import Any

import jax.numpy as jnp
import numpy as np

from benchmarks import report
from benchmarks.accuracy import LAYERS, SHAPE, error
from benchmarks.contenders import BASELINE, JAXNORM, STABLE
from benchmarks.shapes import DTYPES

OFFSETS = 10 ** np.arange(0, 6.1, 0.5)
COLORS = {BASELINE: "tab:red", STABLE: "tab:orange", JAXNORM: "tab:blue"}


def main(argv: list[str] | None = None) -> None:
    """Computes the errors, reads the times, draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("compared", type=pathlib.Path, help="what make bench wrote, as JSON")
    parser.add_argument("--plot", type=pathlib.Path, required=True, help="picture to write")
    chosen = parser.parse_args(argv)
    figure = report.figure(7, 2.8)
    left, right = figure.subplots(1, 2)
    draw_errors(left)
    draw_steps(right, json.loads(chosen.compared.read_text()))
    figure.savefig(chosen.plot)


def draw_errors(panel: Any) -> None:
    """A line per layer, of N(offset, 1) in float32."""
    noise = np.random.default_rng(0).standard_normal(SHAPE)
    data = [jnp.asarray(noise + offset, jnp.float32) for offset in OFFSETS]
    for name, color in COLORS.items():
        panel.loglog(OFFSETS, [error(LAYERS[name], x) for x in data], ".-", color=color, label=name)
    panel.set(xlabel="offset of the data, in standard deviations", title="Largest error of y, float32")
    panel.grid(alpha=0.3)
    panel.legend()


def draw_steps(panel: Any, compared: dict[str, Any]) -> None:
    """A row per layer and dtype: a dot per shape, a line at the geometric mean; in units of Flax's default."""
    rows = []
    for dtype in DTYPES:
        cases = [
            r for r in compared["results"]["cases"] if (r["case"]["dtype"], r["case"]["pass_name"]) == (dtype, "step")
        ]
        for layer, color in COLORS.items():
            seconds = [(r["seconds"][layer]["median"], r["seconds"][BASELINE]["median"]) for r in cases]
            shares = [own / flax for own, flax in seconds]
            panel.plot(shares, [len(rows)] * len(shares), ".", color=color, alpha=0.4)
            panel.plot([statistics.geometric_mean(shares)] * 2, [len(rows) - 0.35, len(rows) + 0.35], color=color)
            rows.append(f"{layer}, {dtype}")
    panel.set_yticks(range(len(rows)), rows)
    panel.invert_yaxis()
    panel.set(
        xlabel=f"time compared with Flax's, {compared['machine']['cores']} CPU cores",
        title="Training step of norm and ReLU",
        xlim=(0, 2),
    )
    panel.grid(axis="x", alpha=0.3)


if __name__ == "__main__":
    main()
