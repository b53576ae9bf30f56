"""The gradients that the other tests believe, against those that JAX forms of the twin."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

pytestmark = [pytest.mark.usefixtures("x64"), pytest.mark.slow]

# Where x is, its channel axes, and the shapes of gamma and beta.
FORMS = [
    ((2, 3, 4, 5), (1,), (3,), (2, 3)),
    ((2, 9, 4, 3), (-1,), (2, 3), (3,)),
    ((3, 4, 2, 5), (1, -1), (4, 5), None),
    ((1, 7, 4), (2,), None, (1, 4)),
]


CASES = [(FORMS[0], tuple(oracle.ACTIVATIONS), 1), *((form, ("silu",), 1) for form in FORMS[1:])]
CASES += [(((2, 6, 4, 5), (1,), (6,), (2, 6)), ("silu",), 3), (((3, 4), (-1,), (4,), None), ("tanh",), 2)]


@pytest.mark.parametrize(("form", "activations", "group_size"), CASES, ids=str)
def test_gradients_are_those_of_the_twin(form, activations, group_size):
    shape, axes, gamma, beta = form
    rng = np.random.default_rng(0)
    shapes = {"x": shape, "gamma": gamma, "beta": beta, "residual": None if gamma is None else shape}
    given = {name: 1 + 2 * rng.standard_normal(shape) for name, shape in shapes.items() if shape is not None}
    dy, options = rng.standard_normal(shape), {"eps": 1e-2, "channel_axes": axes, "group_size": group_size}

    @jax.jit
    def differentiated(given):
        found = {}
        for activation in activations:
            twin = functools.partial(oracle.twin, activation=activation, **options)
            y, pullback = jax.vjp(lambda given, twin=twin: twin(**given), given)
            found[activation] = y, pullback(jnp.asarray(dy))[0]
        return found

    for activation, (y, want) in differentiated(given).items():
        exact, _ = oracle.instance_norm(**given, **options, activation=activation)
        np.testing.assert_allclose(exact, y, rtol=1e-12, atol=1e-12)
        got = oracle.gradients(dy, **given, **options, activation=activation)
        assert got.keys() == want.keys()
        for name, value in got.items():
            assert value.shape == given[name].shape
            message = f"{name} with {activation}"
            np.testing.assert_allclose(value, want[name], rtol=1e-11, atol=1e-11, err_msg=message)
