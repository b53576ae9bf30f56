"""The gradients that the other tests believe, against those that JAX forms of the twin."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

pytestmark = pytest.mark.usefixtures("x64")

# Where x is, its channel axes, and the shapes of gamma and beta.
FORMS = [
    ((2, 3, 4, 5), (1,), (3,), (2, 3)),
    ((2, 9, 4, 3), (-1,), (2, 3), (3,)),
    ((3, 4, 2, 5), (1, -1), (4, 5), None),
    ((1, 7, 4), (2,), None, (1, 4)),
]


CASES = [*((FORMS[0], name, 1) for name in oracle.ACTIVATIONS), *((form, "silu", 1) for form in FORMS[1:])]
CASES += [(((2, 6, 4, 5), (1,), (6,), (2, 6)), "silu", 3), (((3, 4), (-1,), (4,), None), "tanh", 2)]


@pytest.mark.parametrize(("form", "activation", "group_size"), CASES)
def test_gradients_are_those_of_the_twin(form, activation, group_size):
    shape, axes, gamma, beta = form
    rng = np.random.default_rng(0)
    shapes = {"x": shape, "gamma": gamma, "beta": beta, "residual": None if gamma is None else shape}
    given = {name: 1 + 2 * rng.standard_normal(shape) for name, shape in shapes.items() if shape is not None}
    dy, options = rng.standard_normal(shape), {"eps": 1e-2, "channel_axes": axes, "activation": activation}
    options["group_size"] = group_size

    @jax.jit
    def differentiated(given):
        y, pullback = jax.vjp(lambda given: oracle.twin(**given, **options), given)
        return y, pullback(jnp.asarray(dy))[0]

    y, want = differentiated(given)
    np.testing.assert_allclose(oracle.instance_norm(**given, **options)[0], y, rtol=1e-12, atol=1e-12)
    got = oracle.gradients(dy, **given, **options)
    assert got.keys() == want.keys()
    for name, value in got.items():
        assert value.shape == given[name].shape
        np.testing.assert_allclose(value, want[name], rtol=1e-11, atol=1e-11, err_msg=name)
