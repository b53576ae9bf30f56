"""Maximum error against float64 as the data move away from zero: jaxnorm beside Flax. Prints a Markdown table.

python -m benchmarks.accuracy
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import jaxnorm
from benchmarks.report import table

SHAPE = (2, 128, 128, 8)  # (N, H, W, C)
EPSILON = 1e-5


def layers() -> dict[str, nn.Module]:
    return {
        "jaxnorm": jaxnorm.InstanceNorm(epsilon=EPSILON),
        "Flax, default": nn.InstanceNorm(epsilon=EPSILON),
        "Flax, `use_fast_variance=False`": nn.InstanceNorm(epsilon=EPSILON, use_fast_variance=False),
    }


def exact(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    mean = x.mean((1, 2), keepdims=True)
    return (x - mean) / np.sqrt(((x - mean) ** 2).mean((1, 2), keepdims=True) + EPSILON)


def error(layer: nn.Module, x: jax.Array) -> float:
    """The layer's result in float32, so that what is seen is its own error and not the rounding of the output."""
    params = {"params": {"scale": jnp.ones(SHAPE[-1]), "bias": jnp.zeros(SHAPE[-1])}}
    y = jax.jit(layer.apply)(params, x)
    return float(np.abs(np.asarray(y, np.float64) - exact(np.asarray(x))).max())


def main() -> None:
    rows = []
    noise = np.random.default_rng(0).standard_normal(SHAPE)
    for dtype, offsets in {"float32": (0, 1e2, 1e4, 1e6), "bfloat16": (0, 1e2), "float16": (0, 1e2)}.items():
        for offset in offsets:
            x = jnp.asarray(noise + offset, dtype)
            cells = [f"{error(layer, x):.1e}" for layer in layers().values()]
            rows.append([f"{dtype}, offset {offset:g}", *cells])
    print(table(["", *layers()], rows))


if __name__ == "__main__":
    main()
