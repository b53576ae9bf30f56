"""Instance and group norm under every transformation, against the same transformation of the float64 twin."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tolerance
from cases import exhaustive, some
from checked_call import draw
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxnorm
from jaxnorm import pallas_kernel

SHAPE = (2, 5, 5, 8)
POSITIONS = 25
# Instances by every implementation, and groups of four channels.
IMPLEMENTATIONS = {"xla": 1, "reference": 1, "groups by xla": 4, "groups by reference": 4, "pallas": 1}


def group_size(norm):
    return norm.keywords.get("group_size", 1)


def call(name):
    """(x, gamma, beta) -> y."""
    options = {"channel_axis": -1, "activation": jax.nn.silu, "implementation": name.removeprefix("groups by ")}
    if IMPLEMENTATIONS[name] > 1:
        return functools.partial(jaxnorm.group_norm, group_size=IMPLEMENTATIONS[name], **options)
    return functools.partial(jaxnorm.instance_norm, **options)


@functools.cache
def twin(group_size):
    """One object per size, for what is compiled once."""

    def norm(x, gamma=None, beta=None):
        return oracle.twin(x, gamma, beta, channel_axes=(-1,), group_size=group_size, activation="silu")

    return norm


@pytest.fixture
def norm(request):
    """The norm of a name; the kernel runs in the interpreter, and has run."""
    if request.param == "pallas":
        request.getfixturevalue("interpreter")
    return call(request.param)


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
        want = of_twin(transformed, group_size(norm), *(jnp.asarray(value, jnp.float64) for value in given))
    factor *= GROUPS if group_size(norm) > 1 else 1
    relative = factor * tolerance.arithmetic("float32", POSITIONS * group_size(norm))
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        atol = relative * float(np.abs(w).max())
        np.testing.assert_allclose(np.float64(g), w, rtol=0, atol=atol)


@functools.partial(jax.jit, static_argnums=(0, 1))
def of_twin(transformed, size, *given):
    """Compiled once for all implementations."""
    return transformed(twin(size))(*given)


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


def some_mapped(*mapped):
    """The arguments, those that are mapped with an axis of 3 in front."""
    return [many if is_mapped else one for many, one, is_mapped in zip(arguments(3), arguments(), mapped, strict=True)]


def in_shard_map(check_vma):
    def over_batch(norm):
        mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
        specs = (P("data"), P(), P())
        return jax.shard_map(norm, mesh=mesh, in_specs=specs, out_specs=P("data"), check_vma=check_vma)

    return over_batch


def along_other_axes():
    x, gamma, beta = arguments(3)
    return jnp.moveaxis(x, 0, 2), gamma.T, beta


def every_pair(norm):
    """One axis of x, another of gamma and beta."""
    return jax.vmap(jax.vmap(norm, (None, 0, 0)), (0, None, None))


def centered(norm):
    def one(x, gamma, beta):
        y = norm(x, gamma, beta)
        return y - jax.lax.pmean(y, "styles")

    return jax.vmap(one, axis_name="styles")


def of_x_alone(norm):
    """The gamma and beta that are not given must vary as x does."""
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    mapped = jax.shard_map(norm, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    return lambda x, gamma, beta: jax.grad(energy(mapped))(x)


# y has the error of one call, up to the scale of y itself; gradients about ten times that, which are differences of
# sums; second derivatives amplify it by the condition of two further differentiations. In groups the rounded means of
# the channels are compared with each other, in every derivative again.
Y, FIRST, SECOND, GROUPS = 4, 10, 100, 3


class Transformation(NamedTuple):
    """A transformation, and which arguments have a mapped axis of size 3 in front, or the arguments."""

    of: object
    factor: int
    given: object = (False, False, False)
    # JAX refuses to differentiate a checkpoint around the ordered effects of the interpreter, and the interpreter asks
    # for the device of every named axis, those of vmap included: test_kernel_compiled.py has these for the kernel.
    by_kernel: bool = True

    def arguments(self):
        return self.given() if callable(self.given) else some_mapped(*self.given)


X, GAMMA, X_BETA, ALL = (True, False, False), (False, True, False), (True, False, True), (True,) * 3
TRANSFORMATIONS = {
    "none": Transformation(lambda norm: norm, Y),
    "grad": Transformation(gradients, FIRST),
    "grad of grad": Transformation(penalty, SECOND),
    "hvp": Transformation(hessian_vector, SECOND),
    "vmap of hvp": Transformation(lambda norm: jax.vmap(hessian_vector(norm), (0, None, None)), SECOND, X),
    "scan": Transformation(lambda norm: gradients(layers(norm)), SECOND),
    "grad of grad of scan": Transformation(lambda norm: penalty(layers(norm)), SECOND),
    "hvp of scan": Transformation(lambda norm: hessian_vector(layers(norm)), SECOND),
    "shard_map": Transformation(in_shard_map(True), Y),
    "grad of shard_map": Transformation(lambda norm: gradients(in_shard_map(True)(norm)), FIRST),
    "grad of shard_map, check_vma=False": Transformation(lambda norm: gradients(in_shard_map(False)(norm)), FIRST),
    "grad of grad of shard_map": Transformation(lambda norm: penalty(in_shard_map(True)(norm)), SECOND),
    "shard_map of x alone": Transformation(of_x_alone, FIRST),
    "vmap": Transformation(jax.vmap, Y, ALL),
    "vmap over x": Transformation(lambda norm: jax.vmap(norm, (0, None, None)), Y, X),
    "vmap over gamma": Transformation(lambda norm: jax.vmap(norm, (None, 0, None)), Y, GAMMA),
    "vmap over x and beta": Transformation(lambda norm: jax.vmap(norm, (0, None, 0)), Y, X_BETA),
    "vmap along other axes": Transformation(lambda norm: jax.vmap(norm, (2, 1, 0), out_axes=3), Y, along_other_axes),
    "vmap of vmap": Transformation(every_pair, Y, lambda: (arguments(2)[0], *arguments(3)[1:])),
    "vmap with a name": Transformation(centered, Y, ALL, by_kernel=False),
    "vmap of grad": Transformation(lambda norm: jax.vmap(gradients(norm)), FIRST, ALL),
    "vmap of grad over x": Transformation(lambda norm: jax.vmap(gradients(norm), (0, None, None)), FIRST, X),
    "vmap of grad over gamma": Transformation(lambda norm: jax.vmap(gradients(norm), (None, 0, None)), FIRST, GAMMA),
    "vmap of grad over x and beta": Transformation(lambda norm: jax.vmap(gradients(norm), (0, None, 0)), FIRST, X_BETA),
    "grad of vmap": Transformation(lambda norm: gradients(jax.vmap(norm, (0, None, 0))), FIRST, X_BETA),
    "vmap of grad of grad": Transformation(lambda norm: jax.vmap(penalty(norm), (0, None, None)), SECOND, X),
    "checkpoint": Transformation(lambda norm: gradients(jax.checkpoint(norm)), FIRST, by_kernel=False),
    "checkpoint with a policy": Transformation(
        lambda norm: gradients(jax.checkpoint(norm, policy=jax.checkpoint_policies.dots_saveable)),
        FIRST,
        by_kernel=False,
    ),
    "scan of checkpoint": Transformation(lambda norm: gradients(layers(jax.checkpoint(norm))), SECOND, by_kernel=False),
}
KERNEL = pytest.param("pallas", marks=[pytest.mark.kernel, exhaustive])
# `make test` has each transformation once in plain JAX, but for those that differ from others by more of the same, and
# a few by the kernel.
MORE_OF_THE_SAME = ("grad of grad of scan", "vmap of grad of grad", "checkpoint with a policy", "vmap of grad over x")
BY_KERNEL = ("grad", "grad of grad", "scan", "grad of shard_map", "vmap over x and beta")
IN_TURN = ("xla", "groups by xla", "xla", "reference", "xla", "groups by xla", "groups by reference")


def cases():
    for i, (name, transformation) in enumerate(TRANSFORMATIONS.items()):
        for implementation in IMPLEMENTATIONS:
            is_kernel = implementation == "pallas"
            if is_kernel and not transformation.by_kernel:
                continue
            is_in_turn = implementation == IN_TURN[i % len(IN_TURN)] and name not in MORE_OF_THE_SAME
            is_kept = name in BY_KERNEL if is_kernel else is_in_turn
            marks = [pytest.mark.kernel] if is_kernel else []
            marks += [pytest.mark.slow] if is_kernel or name not in ("grad", "vmap over x") else []
            yield pytest.param(implementation, name, marks=marks if is_kept else [*marks, exhaustive])


@pytest.mark.parametrize(("norm", "name"), list(cases()), indirect=["norm"])
def test_transformation(norm, name, request):
    transformation = TRANSFORMATIONS[name]
    given = transformation.arguments()
    if (
        norm.keywords["implementation"] == "pallas"
        and name in ("grad of grad of scan", "hvp of scan")
        and jax.__version_info__ < (0, 12)
    ):
        # There scan drops custom_jvp rules where it evaluates its body in parts.
        reason = "JAX before 0.12 differentiates the launch itself: rule for 'mpmd_map' not implemented"
        request.applymarker(pytest.mark.xfail(raises=NotImplementedError, reason=reason, strict=True))
        # The fixture wants a kernel to have run.
        norm(*arguments())
    check(transformation.of, norm, *given, factor=transformation.factor)


@pytest.mark.slow
@pytest.mark.parametrize("norm", [*some(["xla", "groups by xla", "reference"], "xla"), KERNEL], indirect=True)
@pytest.mark.parametrize("name", some(["grad", "vmap over x", "shard_map", "grad of grad"], "grad", "shard_map"))
def test_transformation_without_jit(norm, name):
    transformation = TRANSFORMATIONS[name]
    check(transformation.of, norm, *transformation.arguments(), factor=transformation.factor, jit=False)


@pytest.mark.slow
def test_forward_mode_of_groups():
    given = arguments()
    check(lambda norm: lambda *given: jax.jvp(norm, given, given)[1], call("groups by reference"), *given, factor=FIRST)
    with pytest.raises(TypeError, match="forward mode"):
        jax.jvp(call("groups by xla"), given, given)


@pytest.mark.slow
@pytest.mark.parametrize("mapped", some([ALL, X, GAMMA], X), ids=str)
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
