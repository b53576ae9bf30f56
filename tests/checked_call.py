"""One call of instance_norm by any implementation, forward and all gradients, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import tolerance

import jaxnorm


def draw(shape, dtype, seed=0, *, offset=0.5):
    """Numbers of the dtype itself: the oracle sees what the implementation sees."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape) * 1.5 + offset, dtype)


def parameter(form, instances, seed):
    """gamma or beta in float32."""
    if form == "none":
        return None
    shape = instances[1:] if form == "shared" else instances
    return jnp.asarray(np.random.default_rng(seed).uniform(0.5, 2.0, shape), jnp.float32)


def check(
    implementation,
    dtype,
    shape,
    channel_axes,
    *,
    group_size=None,
    gamma="shared",
    beta="shared",
    residual=False,
    activation="none",
):
    """Forward and all gradients of one call, against the oracle and its twin."""
    with jax.enable_x64(dtype == "float64"):
        x, dy = draw(shape, dtype, 0), draw(shape, dtype, 1, offset=0.1)
        instances = tuple(shape[a] for a in (0, *sorted(a % len(shape) for a in channel_axes)))
        given = {
            "gamma": parameter(gamma, instances, 2),
            "beta": parameter(beta, instances, 3),
            "residual": draw(shape, dtype, 4) if residual else None,
        }
        given = {name: value for name, value in given.items() if value is not None}

        def call(x, given):
            groups = {} if group_size is None else {"group_size": group_size}
            return (jaxnorm.group_norm if groups else jaxnorm.instance_norm)(
                x,
                **given,
                **groups,
                channel_axis=channel_axes if len(channel_axes) > 1 else channel_axes[0],
                activation=oracle.ACTIVATIONS[activation].jax,
                implementation=implementation,
            )

        @jax.jit
        def step(x, given, dy):
            y, pullback = jax.vjp(call, x, given)
            return y, *pullback(dy)

        y, dx, grads = step(x, given, dy)

    group_size = group_size or 1
    positions = int(np.prod([shape[a] for a in oracle.spatial_axes(len(shape), channel_axes)])) * group_size
    options = {"channel_axes": channel_axes, "group_size": group_size, "activation": activation}
    y64, magnitude = oracle.instance_norm(x, **given, **options)
    assert y.dtype == dtype
    assert y.shape == shape
    np.testing.assert_allclose(np.float64(y), y64, rtol=0, atol=tolerance.forward(dtype, positions, magnitude))

    want = oracle.gradients(dy, x, **given, **options)
    mean, var = oracle.moments(x, channel_axes, group_size=group_size)
    xhat = np.abs(np.float64(x) - mean) / np.sqrt(var + 1e-5)
    dz = 2 * float(np.abs(np.float64(dy)).max())
    scale = float((1 / np.sqrt(var + 1e-5)).max()) * (2.0 if "gamma" in given else 1.0)
    for name, got in {"x": dx, **grads}.items():
        assert got.dtype == (jnp.float32 if name in ("gamma", "beta") else dtype), name
        assert got.shape == want[name].shape, name
        if name == "x":
            # The sums of dz and of dz * xhat are formed before the kernel rounds it.
            kept = implementation == "pallas" and activation != "none"
            sizes = {"scale": scale, "dz": dz, "xhat": float(xhat.max())}
            atol = tolerance.input_gradient(dtype, positions, want[name], **sizes, keeps_dz=kept)
        elif name == "residual":
            # dz = dy * activation'(z): an error of z moves the derivative, whose own derivative stays below 2
            atol = dz * (2 * tolerance.arithmetic(dtype, positions) * magnitude + tolerance.unit(dtype))
        else:
            terms = 2 * np.abs(np.float64(dy)) * (xhat if name == "gamma" else 1.0)
            axes = tuple(a for a in range(len(shape)) if a not in {c % len(shape) for c in channel_axes})
            atol = tolerance.parameter_gradient(dtype, jnp.float32, positions, float(terms.sum(axes).max()))
        np.testing.assert_allclose(np.float64(got), want[name], rtol=0, atol=atol, err_msg=name)
