"""Every implementation under every transformation, against the same transformation of the float64 twin."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tolerance
from checked_call import draw
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxnorm
from jaxnorm import pallas_kernel

SHAPE = (2, 5, 5, 8)
POSITIONS = 25


PLAIN = ["xla", "reference"]


@pytest.fixture(params=[*PLAIN, pytest.param("pallas", marks=pytest.mark.slow)])
def norm(request):
    """(x, gamma, beta) -> y; the kernel runs in the interpreter, and has run."""
    if request.param == "pallas":
        request.getfixturevalue("interpreter")
    return call(request.param)


def call(implementation):
    return functools.partial(
        jaxnorm.instance_norm, channel_axis=-1, activation=jax.nn.silu, implementation=implementation
    )


def twin(x, gamma=None, beta=None):
    return oracle.twin(x, gamma, beta, channel_axes=(-1,), activation="silu")


def arguments(*lead):
    """x, gamma and beta, each with the leading axes."""
    return (
        draw((*lead, *SHAPE), "float32", 0),
        jnp.asarray(np.random.default_rng(1).uniform(0.5, 2, (*lead, 8)), jnp.float32),
        draw((*lead, 8), "float32", 2),
    )


def check(transformed, norm, *given, factor, jit=True):
    """The factor says what the transformation makes of the relative error of one call."""
    call = transformed(norm)
    got = (jax.jit(call) if jit else call)(*given)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        want = of_twin(transformed, *(jnp.asarray(value, jnp.float64) for value in given))
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        atol = factor * tolerance.arithmetic("float32", POSITIONS) * float(np.abs(w).max())
        np.testing.assert_allclose(np.float64(g), w, rtol=0, atol=atol)


@functools.partial(jax.jit, static_argnums=0)
def of_twin(transformed, *given):
    """Compiled once for all implementations."""
    return transformed(twin)(*given)


def energy(norm):
    return lambda *given: jnp.sum(jnp.sin(norm(*given)))


def gradients(norm):
    return jax.grad(energy(norm), (0, 1, 2))


def penalty(norm):
    """The derivatives of a gradient penalty: grad of grad."""
    return jax.grad(lambda *given: jnp.sum(jax.grad(energy(norm))(*given) ** 2), (0, 1, 2))


def hessian_vector(norm):
    """Forward over reverse, the usual recipe for products with the Hessian."""
    return lambda *given: jax.jvp(gradients(norm), given, given)[1]


def layers(norm):
    """Three layers that share their parameters, by scan."""

    def network(x, gamma, beta):
        return jax.lax.scan(lambda x, _: (x + norm(x, gamma, beta), None), x, None, length=3)[0]

    return network


@functools.cache
def mapping(*in_axes, derivative=None):
    """vmap of the norm, or of its derivative; one object for the same axes, for what is compiled once."""
    return lambda norm: jax.vmap(norm if derivative is None else derivative(norm), in_axes)


def some_mapped(*mapped):
    """The arguments, those that are mapped with an axis of 3 in front."""
    return [many if is_mapped else one for many, one, is_mapped in zip(arguments(3), arguments(), mapped, strict=True)]


@functools.cache
def in_shard_map(check_vma):
    def over_batch(norm):
        mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
        specs = (P("data"), P(), P())
        return jax.shard_map(norm, mesh=mesh, in_specs=specs, out_specs=P("data"), check_vma=check_vma)

    return over_batch


# y has the error of one call, up to the scale of y itself; gradients about ten times that, which are differences of
# sums; second derivatives amplify it by the condition of two further differentiations.
Y, FIRST, SECOND = 4, 10, 100


@pytest.mark.parametrize(
    ("transformation", "factor"),
    [
        (lambda norm: norm, Y),
        (gradients, FIRST),
        (penalty, SECOND),
        (hessian_vector, SECOND),
        (lambda norm: jax.vmap(hessian_vector(norm), (0, None, None)), SECOND),
        (lambda norm: gradients(layers(norm)), SECOND),
        (in_shard_map(True), Y),
        (lambda norm: gradients(in_shard_map(True)(norm)), FIRST),
        (lambda norm: gradients(in_shard_map(False)(norm)), FIRST),
        (lambda norm: penalty(in_shard_map(True)(norm)), SECOND),
    ],
    ids=[
        "none",
        "grad",
        "grad of grad",
        "hvp",
        "vmap of hvp",
        "scan",
        "shard_map",
        "grad of shard_map",
        "grad of shard_map, check_vma=False",
        "grad of grad of shard_map",
    ],
)
def test_transformation(norm, transformation, factor):
    check(transformation, norm, *arguments(), factor=factor)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("transformation", "factor"),
    [(gradients, FIRST), (penalty, SECOND), (in_shard_map(True), Y)],
    ids=["grad", "grad of grad", "shard_map"],
)
def test_transformation_without_jit(norm, transformation, factor):
    check(transformation, norm, *arguments(), factor=factor, jit=False)


def test_vmap_without_jit(norm):
    check(mapping(0, None, 0), norm, *some_mapped(True, False, True), factor=Y, jit=False)


@pytest.mark.parametrize(
    "mapped", [(True, True, True), (True, False, False), (False, True, False), (True, False, True)]
)
@pytest.mark.parametrize("derivative", [None, gradients], ids=["vmap", "vmap of grad"])
def test_vmap(norm, derivative, mapped):
    axes = (0 if is_mapped else None for is_mapped in mapped)
    factor = Y if derivative is None else FIRST
    check(mapping(*axes, derivative=derivative), norm, *some_mapped(*mapped), factor=factor)


def along_other_axes(norm):
    return jax.vmap(norm, (2, 1, 0), out_axes=3)


def test_vmap_along_other_axes(norm):
    x, gamma, beta = arguments(3)
    check(along_other_axes, norm, jnp.moveaxis(x, 0, 2), gamma.T, beta, factor=Y)


def every_pair(norm):
    """One axis of x, another of gamma and beta."""
    return jax.vmap(jax.vmap(norm, (None, 0, 0)), (0, None, None))


def test_vmap_of_vmap(norm):
    check(every_pair, norm, arguments(2)[0], *arguments(3)[1:], factor=Y)


def gradients_of_vmap(norm):
    return gradients(jax.vmap(norm, (0, None, 0)))


def test_grad_of_vmap(norm):
    check(gradients_of_vmap, norm, *some_mapped(True, False, True), factor=FIRST)


@pytest.mark.slow
def test_vmap_of_the_second_derivative(norm):
    transformation = mapping(0, None, None, derivative=penalty)
    check(transformation, norm, arguments(2)[0], *arguments()[1:], factor=SECOND)


@functools.cache
def through_layers(transformation):
    return lambda norm: transformation(layers(norm))


@pytest.mark.slow
@pytest.mark.parametrize("transformation", [penalty, hessian_vector], ids=["grad of grad", "HVP"])
def test_second_derivative_of_scan(norm, transformation, request):
    if norm.keywords["implementation"] == "pallas" and jax.__version_info__ < (0, 12):
        # There scan drops custom_jvp rules where it evaluates its body in parts.
        reason = "JAX before 0.12 differentiates the launch itself: rule for 'mpmd_map' not implemented"
        request.applymarker(pytest.mark.xfail(raises=NotImplementedError, reason=reason, strict=True))
        # The fixture wants a kernel to have run.
        norm(*arguments())
    check(through_layers(transformation), norm, *arguments(), factor=SECOND)


# JAX refuses to differentiate a checkpoint around the ordered effects of the interpreter, and the interpreter asks for
# the device of every named axis, those of vmap included: test_kernel_compiled.py has these for the kernel.


@pytest.mark.slow
@pytest.mark.parametrize("implementation", PLAIN)
@pytest.mark.parametrize(
    ("transformation", "factor"),
    [
        (lambda norm: gradients(jax.checkpoint(norm)), FIRST),
        (lambda norm: gradients(jax.checkpoint(norm, policy=jax.checkpoint_policies.dots_saveable)), FIRST),
        (lambda norm: gradients(layers(jax.checkpoint(norm))), SECOND),
    ],
    ids=["checkpoint", "checkpoint with a policy", "scan of checkpoint"],
)
def test_checkpoint(implementation, transformation, factor):
    check(transformation, call(implementation), *arguments(), factor=factor)


def centered(norm):
    def one(x, gamma, beta):
        y = norm(x, gamma, beta)
        return y - jax.lax.pmean(y, "styles")

    return jax.vmap(one, axis_name="styles")


@pytest.mark.parametrize("implementation", PLAIN)
def test_vmap_with_a_name(implementation):
    check(centered, call(implementation), *arguments(3), factor=Y)


@pytest.mark.slow
def test_shard_map_of_x_alone(norm):
    """The gamma and beta that are not given must vary as x does."""

    def alone(norm):
        mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
        return jax.grad(energy(jax.shard_map(norm, mesh=mesh, in_specs=P("data"), out_specs=P("data"))))

    check(alone, norm, arguments()[0], factor=FIRST)


@pytest.mark.parametrize("mapped", [(True, True, True), (True, False, False), (False, True, False)])
def test_vmap_is_one_launch(interpreter, mapped, monkeypatch):
    norm = functools.partial(call("pallas"), activation=None)
    given = [value if is_mapped else value[0] for value, is_mapped in zip(arguments(3), mapped, strict=True)]
    in_axes = tuple(0 if is_mapped else None for is_mapped in mapped)
    launched = []

    def spy(x, *arguments, original=pallas_kernel.forward, **options):
        launched.append(x.shape)
        return original(x, *arguments, **options)

    monkeypatch.setattr(pallas_kernel, "forward", spy)
    jax.block_until_ready(jax.jit(jax.vmap(norm, in_axes))(*given))
    # The mapped axis is in the batch, B = 3 * 2, and not a grid axis of its own.
    assert set(launched) == {(6, POSITIONS, 8)}
