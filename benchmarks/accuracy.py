"""Largest error of y against float64 as the data move away from zero, compared with Flax.

python -m benchmarks.accuracy

The layers return float32, so what is seen is their own error and not the rounding of the output.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import jaxnorm
from benchmarks import report
from benchmarks.contenders import BASELINE, JAXNORM, STABLE
from benchmarks.shapes import EPSILON

SHAPE = (2, 128, 128, 8)  # (N, H, W, C)
LAYERS = {
    JAXNORM: jaxnorm.InstanceNorm(epsilon=EPSILON),
    BASELINE: nn.InstanceNorm(epsilon=EPSILON),
    STABLE: nn.InstanceNorm(epsilon=EPSILON, use_fast_variance=False),
}
# (dtype, mean, standard deviation); the last of float32 is that of raw 16-bit images.
DATA = [
    *(("float32", mean, 1) for mean in (0, 3, 30, 100, 1e4, 1e6)),
    ("float32", 4e4, 200),
    *((dtype, mean, 1) for dtype in ("bfloat16", "float16") for mean in (0, 100)),
]


def exact(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    mean = x.mean((1, 2), keepdims=True)
    return (x - mean) / np.sqrt(((x - mean) ** 2).mean((1, 2), keepdims=True) + EPSILON)


def error(layer: nn.Module, x: jax.Array) -> float:
    params = {"params": {"scale": jnp.ones(SHAPE[-1]), "bias": jnp.zeros(SHAPE[-1])}}
    y = jax.jit(layer.apply)(params, x)
    return float(np.abs(np.asarray(y, np.float64) - exact(np.asarray(x))).max())


def main(argv: list[str] | None = None) -> None:
    """Computes, prints, writes."""
    chosen = report.parser(__doc__).parse_args(argv)
    noise = np.random.default_rng(0).standard_normal(SHAPE)
    results = []
    for dtype, mean, std in DATA[:2] if chosen.quick else DATA:
        x = jnp.asarray(noise * std + mean, dtype)
        errors = {name: error(layer, x) for name, layer in LAYERS.items()}
        results.append({"dtype": dtype, "mean": mean, "std": std, "errors": errors})
    rows = [
        [f"{r['dtype']}, N({r['mean']:g}, {r['std']}²)", *(f"{value:.1e}" for value in r["errors"].values())]
        for r in results
    ]
    title = f"Largest error of y against float64, x of shape {SHAPE}"
    report.publish(chosen, title, [report.table(["", *LAYERS], rows)], report.machine(), results)


if __name__ == "__main__":
    main()
