"""What exporters need: tools that translate JAX operation by operation take implementation="reference"."""

import functools

import jax
import jax.numpy as jnp
import pytest

import jaxnorm

X = jax.ShapeDtypeStruct((2, 6, 6, 8), jnp.float32)


@pytest.mark.parametrize("activation", [None, jax.nn.relu, jax.nn.silu])
def test_the_reference_form_takes_the_maximum_without_initial(activation, monkeypatch):
    """Exporters replace the functions of jax.numpy by their own, and those have no initial (jax2onnx 0.17)."""
    plain = jnp.max

    def strict(*arguments, initial=None, **options):
        assert initial is None
        return plain(*arguments, **options)

    monkeypatch.setattr(jnp, "max", strict)
    norm = functools.partial(jaxnorm.instance_norm, activation=activation, implementation="reference")
    jax.make_jaxpr(norm)(X)


def test_the_reference_form_has_no_primitive_of_ours():
    norm = functools.partial(jaxnorm.instance_norm, implementation="reference")
    assert "instance_norm" not in str(jax.make_jaxpr(norm)(X))
    assert "instance_norm" in str(jax.make_jaxpr(jaxnorm.instance_norm)(X))
