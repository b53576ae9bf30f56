"""How far from zero the inputs of norms are inside networks: |mean| / std of each channel, at initialization.

python -m benchmarks.offsets

The networks are those of benchmarks.networks, on a photograph. What a norm gets there decides how accurate its variance
must be: see benchmarks.accuracy.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import report
from benchmarks.contenders import JAXNORM
from benchmarks.models import LAYERS, Activation
from benchmarks.networks import WIDE
from jaxnorm import instance_moments


def main(argv: list[str] | None = None) -> None:
    """Computes, prints, writes."""
    chosen = report.parser(__doc__).parse_args(argv)
    # Photographs have no third axis.
    networks = {name: network for name, network in WIDE.items() if len(network.images) == 4}
    results = {name: ratios(network.make, photograph(network.images)) for name, network in networks.items()}
    rows = [
        [name, str(r.size), *(f"{np.percentile(r, q):.1f}" for q in (50, 90, 99, 100))] for name, r in results.items()
    ]
    parts = [report.table(["", "channels", "median", "90th percentile", "99th percentile", "largest"], rows)]
    figures = {name: sorted(map(float, r)) for name, r in results.items()}
    report.publish(chosen, "|mean| / std at the inputs of norms, at initialization", parts, report.machine(), figures)


def photograph(shape: tuple[int, ...]) -> jax.Array:
    """The photograph of a temple that scikit-learn ships, in [-1, 1], in color or gray."""
    from sklearn.datasets import load_sample_images

    pixels = load_sample_images().images[0].astype(np.float32)[None] / 127.5 - 1
    if shape[-1] == 1:
        pixels = pixels.mean(-1, keepdims=True)
    return jax.image.resize(pixels, shape, "linear")


def ratios(make: Any, x: jax.Array) -> np.ndarray:
    """|mean| / std of every channel of every input of a norm."""
    found = []

    def recorded(x: jax.Array, activation: Activation | None = None, residual: jax.Array | None = None) -> jax.Array:
        mean, variance = instance_moments(x, channel_axis=-1)
        found.append(jnp.abs(mean) / jnp.sqrt(variance))
        return LAYERS[JAXNORM](x, activation, residual)

    network: nn.Module = make(recorded)
    params = jax.jit(functools.partial(make(LAYERS[JAXNORM]).init, jax.random.key(0)))(x)

    def run(params: Any) -> list[jax.Array]:
        found.clear()
        network.apply(params, x)
        return list(found)

    return np.concatenate([np.ravel(each) for each in jax.jit(run)(params)])


if __name__ == "__main__":
    main()
