"""The first picture of the README: the error of y against the offset, and training steps of networks.

    make bench-networks
    python -m benchmarks.hero benchmarks/results/networks.json --plot benchmarks/results/hero.png

Errors are computed here. The times are those of the report of benchmarks.networks.
"""

import argparse
import json
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np

from benchmarks import report
from benchmarks.accuracy import LAYERS, SHAPE, error
from benchmarks.contenders import BASELINE, JAXNORM, STABLE

OFFSETS = 10 ** np.arange(0, 6.1, 0.5)
COLORS = {BASELINE: "tab:red", STABLE: "tab:orange", JAXNORM: "tab:blue"}


def main(argv: list[str] | None = None) -> None:
    """Computes the errors, reads the times, draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", type=pathlib.Path, help="what make bench-networks wrote, as JSON")
    parser.add_argument("--plot", type=pathlib.Path, required=True, help="picture to write")
    chosen = parser.parse_args(argv)
    figure = report.figure(7, 2.8)
    left, right = figure.subplots(1, 2)
    draw_errors(left)
    draw_steps(right, json.loads(chosen.networks.read_text()))
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


def draw_steps(panel: Any, networks: dict[str, Any]) -> None:
    """A bar per network and layer: milliseconds compared with Flax's default, with the quartiles of the ratio."""
    results = {(r["network"], r["layer"]): r for r in networks["results"]}
    names = list(dict.fromkeys(network for network, _ in results))
    for i, (layer, color) in enumerate(COLORS.items()):
        ratios = [results[network, layer]["ratio"] for network in names]
        medians = [ratio["median"] for ratio in ratios]
        spread = [[r["median"] - r["low"] for r in ratios], [r["high"] - r["median"] for r in ratios]]
        places = np.arange(len(names)) + 0.27 * (i - 1)
        panel.barh(places, medians, 0.25, xerr=spread, color=color, error_kw={"linewidth": 1})
    panel.set_yticks(range(len(names)), [name.replace(", ", "\n") for name in names])
    panel.invert_yaxis()
    panel.set(xlabel=f"time compared with Flax's, {networks['machine']['cores']} CPU cores", title="Training step")
    panel.grid(axis="x", alpha=0.3)


if __name__ == "__main__":
    main()
