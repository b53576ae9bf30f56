"""How far a result may be from float64: derived from the dtypes and the number of positions, nowhere else.

u is the rounding unit of the dtype of the statistics (float32, or float64 for float64 input).

    16          the variance from one pass around a center that is the mean of 1/16 of an instance: the mean square that
                is rounded is at most 16 times the variance (jaxnorm/sums), and half of that error reaches 1/sqrt
    log2(M)     depth of a sum of M terms, as XLA forms it: pairwise or in blocks
    4           the few roundings of the affine, the residual add and the activation; derivatives of the activations
                used here stay below 2

A group has the positions of all its channels. Merging these rounds a variance four times more, without cancellation,
for which the half of the 16 that does not reach 1/sqrt is enough.

A result in a narrower dtype is rounded once more, to half a unit in its last place.
"""

import jax.numpy as jnp
import numpy as np


def unit(dtype) -> float:
    """Relative rounding error of the dtype."""
    return float(jnp.finfo(dtype).eps) / 2


def arithmetic(dtype, positions: int) -> float:
    """Relative error of what is computed from the sums of an instance with that many positions."""
    statistics = "float64" if dtype == "float64" else "float32"
    return (16 + np.log2(max(positions, 2)) + 4) * unit(statistics)


def sums_around(share: float, positions: int) -> float:
    """Relative error of y in float32 where the mean square around the provisional center is `share` variances.

    The mean square has the error of a sum and of a quotient, relative to itself, so `share` times as much relative to
    the variance; half of that reaches 1/sqrt. The share is 1 where the center is near the mean, as for most data, and
    16 where the rows whose mean is the center are as far from the rest as they can be.
    """
    return (share * (np.log2(max(positions, 2)) + 1) / 2 + 4) * unit("float32")


def forward(dtype, positions: int, magnitude: float) -> float:
    """Absolute tolerance of y; magnitude is the largest |xhat gamma| + |beta| + |residual|."""
    return (arithmetic(dtype, positions) + unit(dtype)) * magnitude + smallest(dtype)


def input_gradient(dtype, positions: int, dx, *, scale: float, dz: float, xhat: float, keeps_dz: bool = False) -> float:
    """Absolute tolerance of dx = scale * (dz - mean(dz) - xhat * mean(dz * xhat)); |mean(dz * xhat)| <= max |dz|.

    keeps_dz: the GPU kernel keeps dz in the dtype of x between its two sweeps, which rounds it where that is narrower.
    """
    terms = scale * dz * (2 + xhat)
    kept = unit(dtype) * scale * dz if keeps_dz and unit(dtype) > unit("float32") else 0.0
    rounded = unit(dtype) * float(np.abs(dx).max(initial=0.0))
    return 2 * arithmetic(dtype, positions) * terms + kept + rounded + smallest(dtype)


def parameter_gradient(dtype, parameter_dtype, positions: int, absolute_sum: float) -> float:
    """Absolute tolerance of a sum whose terms have that sum of magnitudes."""
    return (2 * arithmetic(dtype, positions) + unit(parameter_dtype)) * absolute_sum


def smallest(dtype) -> float:
    """Half the spacing of the subnormal numbers."""
    return float(jnp.finfo(dtype).smallest_subnormal)
