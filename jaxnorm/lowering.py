"""A pass in plain XLA that is traced where it is lowered, in the form of the platform that it is lowered for.

lax.platform_dependent traces the form of every platform, of which one is used: that took half of the time to trace and
lower a small step. Here a primitive stands for the pass until then. It needs no derivatives, which jaxnorm.derivatives
has.
"""

import functools
from collections.abc import Callable
from typing import Any, Protocol, Self

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from jaxnorm.sums import Platform


class PlainPass(Protocol):
    """A pass, hashable. The first of its arrays is x, and no other is larger."""

    def __call__(self, platform: Platform, *arguments: Any) -> Any:
        """The results in the form of a platform."""

    def like(self, *arguments: Any) -> Any:
        """For each result the argument that has its shape and dtype."""

    def with_mapped_axis(self) -> Self:
        """The pass where every array has one more axis, in front, of size 1 where a mask is repeated along it."""


_FORMS: dict[str, Platform] = {"cpu": "cpu", "cuda": "gpu", "rocm": "gpu"}
_OTHERWISE: Platform = "tpu"

_pass = Primitive("instance_norm_pass")
_pass.multiple_results = True


def for_its_platform(plain: PlainPass, *arguments: Any) -> Any:
    """plain(platform, *arguments) for the platform that it will be lowered for, of arrays that vary together."""
    values, structure = jax.tree.flatten(arguments)
    results = _pass.bind(*values, plain=plain, structure=structure)
    return jax.tree.unflatten(jax.tree.structure(plain.like(*arguments)), results)


def for_every_platform(plain: PlainPass, *arguments: Any) -> Any:
    """The same with all forms traced now, so that JAX's rules for what they are made of apply."""

    def form(platform: Platform) -> Callable[..., Any]:
        return lambda *arguments: plain(platform, *arguments)

    forms = {platform: form(platform) for platform in {*_FORMS.values(), _OTHERWISE}}
    chosen = {name: forms[platform] for name, platform in _FORMS.items()}
    return lax.platform_dependent(*arguments, **chosen, default=forms[_OTHERWISE])


def _flat(function: Callable[..., Any], structure: Any, *values: Any) -> list[Any]:
    """The leaves of function(*arguments), of the leaves of its arguments."""
    return jax.tree.leaves(function(*jax.tree.unflatten(structure, values)))


def _evaluated(*values: Any, plain: PlainPass, structure: Any) -> list[Any]:
    return _flat(functools.partial(for_every_platform, plain), structure, *values)


def _types(*types: Any, plain: PlainPass, structure: Any) -> list[Any]:
    return [own.strip_weak_type() for own in _flat(plain.like, structure, *types)]


def _batched(
    values: tuple[Any, ...], axes: tuple[int | None, ...], *, plain: PlainPass, structure: Any
) -> tuple[list[Any], list[int]]:
    if axes[0] is None:
        # What is computed of x alone must be computed once: JAX's own rules see to that.
        run = functools.partial(_flat, functools.partial(for_every_platform, plain), structure)
        results = jax.vmap(run, axes)(*values)
        return results, [0] * len(results)
    size = values[0].shape[axes[0]]

    def with_mapped_axis(value: jax.Array, axis: int | None) -> jax.Array:
        if axis is not None:
            return jnp.moveaxis(value, axis, 0)
        return jnp.broadcast_to(value, (1 if value.dtype == bool else size, *value.shape))

    mapped = map(with_mapped_axis, values, axes)
    results = _pass.bind(*mapped, plain=plain.with_mapped_axis(), structure=structure)
    return results, [0] * len(results)


def _lowering(platform: Platform) -> mlir.LoweringRule:
    def lowered(*values: Any, plain: PlainPass, structure: Any) -> list[Any]:
        return _flat(functools.partial(plain, platform), structure, *values)

    return mlir.lower_fun(lowered)


_pass.def_impl(_evaluated)
_pass.def_abstract_eval(_types)
batching.primitive_batchers[_pass] = _batched
for _name, _platform in _FORMS.items():
    mlir.register_lowering(_pass, _lowering(_platform), platform=_name)
mlir.register_lowering(_pass, _lowering(_OTHERWISE))
