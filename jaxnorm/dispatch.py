"""The two passes as primitives, whose implementation is chosen when they are lowered.

Only then it is known which platform computes, on one device or on many, and on which GPU. So a pass is traced once, in
one form, and what is chosen is right for what is compiled.

    one device, or the part of one device in shard_map   the kernel, or plain XLA tuned for the platform
    several GPUs, by jit                                 the same, with a rule by which XLA divides it
    several other devices, by jit; symbolic sizes        plain XLA on the N-d array, which XLA divides itself

Under vmap the mapped axis becomes one more batch axis: it stays one pass, and with the kernel one launch.
"""

import abc
import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from jaxnorm import sharding, xla
from jaxnorm.call import Call, Gradients, Operands, Statistics
from jaxnorm.gpu.devices import DEVICES, NOT_PROVEN, Device, facts, if_proven, interpreted, is_any_proven, named
from jaxnorm.gpu.tile import NoTile, Tile
from jaxnorm.platforms import Cpu, Divided, Generic, Gpu, Platform

_PLATFORMS: dict[str, type[Platform]] = {"cpu": Cpu, "cuda": Gpu, "rocm": Gpu}


class Pass(abc.ABC):
    """A pass, by any implementation: FORWARD or BACKWARD."""

    name: str

    def __init__(self) -> None:
        self.primitive = Primitive(f"instance_norm_{self.name}")
        self.primitive.multiple_results = True

    @abc.abstractmethod
    def results(self, operands: Operands, *others: Any) -> Any:
        """A tree with the structure, the shapes and the dtypes of the results."""

    @abc.abstractmethod
    def in_plain_xla(self, platform: Platform, call: Call, *arguments: Any) -> Any: ...

    @abc.abstractmethod
    def by_kernel(self, tile: Tile, call: Call, *arguments: Any) -> Any: ...

    @abc.abstractmethod
    def arrays(self, operands: Operands) -> int:
        """How many x-sized arrays the kernel keeps in shared memory."""

    def tile(self, call: Call, operands: Any, device: Device | None) -> Tile | NoTile:
        """The tile of the GPU kernel, or the reason why it does not run.

        Args:
          call: the static half.
          operands: Operands, or their types.
          device: the GPU that computes, or None if that is no CUDA GPU or not known.
        """
        reason = _not_by_kernel(call, operands)
        if reason is not None:
            return NoTile(reason)
        if device is None:
            return NoTile("no CUDA GPU here")
        if call.implementation is None and not is_any_proven(device):
            return NOT_PROVEN
        from jaxnorm.gpu import cost, elementwise, tile

        primitive = elementwise.first_uncovered(call.activation)
        if primitive is not None:
            return NoTile(f"the kernel cannot evaluate {primitive!r}, a primitive of the activation")
        view, itemsize = call.layout(operands.x.shape).view_shape, operands.x.dtype.itemsize
        instructions = cost.instructions(call.activation, self.name, narrow=itemsize < 4)
        found = tile.find_tile(view, itemsize, self.arrays(operands), device, instructions, call.group_size)
        return if_proven(found, device) if call.implementation is None else found

    def bind(self, call: Call, *arguments: Any) -> Any:
        """The results, computed when and where the program runs."""
        values, structure = jax.tree.flatten(arguments)
        results = self.primitive.bind(*values, call=call, structure=structure)
        return jax.tree.unflatten(jax.tree.structure(self.results(*arguments)), results)


class _Forward(Pass):
    """From Operands to y and the Statistics."""

    name = "forward"

    def results(self, operands: Operands, *others: Any) -> Any:
        return operands.x, Statistics(*(operands.gamma for _ in Statistics._fields))

    def in_plain_xla(self, platform: Platform, call: Call, *arguments: Any) -> Any:
        return xla.forward(platform, *arguments, eps=call.eps, activation=call.activation)

    def by_kernel(self, tile: Tile, call: Call, *arguments: Any) -> Any:
        from jaxnorm import pallas_kernel

        (operands,) = arguments
        form = Gpu(call.layout(operands.x.shape))
        views = xla.views(form, operands)
        y, found = pallas_kernel.forward(*views[:4], eps=call.eps, activation=call.activation, tile=tile)
        count = jnp.full_like(views.gamma, tile.positions)
        statistics = Statistics(found.center, found.delta, found.rstd, found.variance, count)
        return form.array(y, final=True), jax.tree.map(form.instances, statistics)

    def arrays(self, operands: Operands) -> int:
        return 1 + (operands.residual is not None)


class _Backward(Pass):
    """From Operands, whose residual is None where the gradients do not depend on it, Statistics and dy to Gradients."""

    name = "backward"

    def results(self, operands: Operands, *others: Any) -> Any:
        return Gradients(operands.x, operands.gamma, operands.beta, operands.residual)

    def in_plain_xla(self, platform: Platform, call: Call, *arguments: Any) -> Any:
        return xla.backward(platform, *arguments, activation=call.activation)

    def by_kernel(self, tile: Tile, call: Call, *arguments: Any) -> Any:
        from jaxnorm import pallas_kernel

        operands, statistics, dy = arguments
        form = Gpu(call.layout(operands.x.shape))
        x, gamma, beta, residual, *_ = xla.views(form, operands)
        statistics = jax.tree.map(form.view_instances, statistics)
        found = pallas_kernel.backward(
            x, statistics, gamma, beta, residual, form.view(dy), activation=call.activation, tile=tile
        )
        return Gradients(
            form.array(found.x, final=True),
            form.instances(found.gamma),
            form.instances(found.beta),
            None if found.residual is None else form.array(found.residual, final=True),
        )

    def arrays(self, operands: Operands) -> int:
        # The gradients depend on the residual only through the activation.
        return 2 + (operands.residual is not None)


def _not_by_kernel(call: Call, operands: Operands) -> str | None:
    """Why the kernel does not compute a call, on whatever device."""
    if operands.where is not None:
        return "the kernel computes no masks (where=)"
    if operands.center is not None:
        return "statistics that are given (moments=) leave nothing to reduce, and plain XLA reads x once, too"
    spread_over = call.axis_name if call.channel_axis_name is None else call.channel_axis_name
    if spread_over is not None:
        return f"the kernel needs instances that lie on one device whole: these are spread over {spread_over!r}"
    return None


def _on_one_device(one_pass: Pass, platform: str, device: Device | None, call: Call, *arguments: Any) -> Any:
    """A pass where all of its arrays are on one device.

    Raises:
      ValueError: implementation="pallas" and the kernel cannot run.
    """
    if call.implementation == "pallas" or (call.implementation is None and device is not None):
        tile = one_pass.tile(call, arguments[0], device)
        if isinstance(tile, Tile):
            results = one_pass.by_kernel(tile, call, *arguments)
            # The results of a kernel are typed as the same on every device.
            return sharding.vary_together((results, arguments[0].x))[0]
        if call.implementation == "pallas":
            needs_gpu = device is None and _not_by_kernel(call, arguments[0]) is None and platform != "cuda"
            raise _cannot_run(f"it needs a CUDA GPU: this computation runs on {platform}" if needs_gpu else tile.reason)
    form = _PLATFORMS.get(platform, Generic)
    layout = call.layout(arguments[0].x.shape)
    return one_pass.in_plain_xla(form(layout, call.axis_name, call.channel_axis_name), call, *arguments)


def _on_many_devices(one_pass: Pass, call: Call, *arguments: Any) -> Any:
    """A pass whose arrays jit may have split, or have symbolic sizes."""
    if call.implementation == "pallas":
        raise _cannot_run(
            "it computes arrays that are on one device whole, or divided by jit over the batch or channels"
        )
    layout = call.layout(arguments[0].x.shape)
    return one_pass.in_plain_xla(Divided(layout, call.axis_name, call.channel_axis_name), call, *arguments)


def _cannot_run(reason: str) -> ValueError:
    return ValueError(f"implementation='pallas' cannot run here: {reason}. Pass implementation=None or 'xla'.")


# The rules of the primitives.


def _lowering(one_pass: Pass, platform: str) -> Callable[..., Any]:
    def rule(context: Any, *values: Any, call: Call, structure: Any) -> Any:
        is_symbolic = any(not isinstance(size, int) for size in context.avals_in[0].shape)
        mesh = context.avals_in[0].sharding.mesh
        device = call.device or _device(context, platform)
        on_one = functools.partial(_on_one_device, one_pass, platform, device)

        def run(*values: Any) -> list[jax.Array]:
            arguments = jax.tree.unflatten(structure, values)
            if not is_symbolic and not _is_divided(context):
                results = on_one(call, *arguments)
            elif platform == "cuda" and not is_symbolic and not mesh.manual_axes and _devices(context):
                results = sharding.divided(on_one, call, one_pass.results(*arguments), *arguments)
            else:
                results = _on_many_devices(one_pass, call, *arguments)
            return jax.tree.leaves(results)

        return mlir.lower_fun(run)(context, *values)

    return rule


def _is_divided(context: Any) -> bool:
    """Whether the program runs on several devices, and XLA may divide its arrays among them.

    Inside shard_map over all axes of a mesh, arrays are the part of one device.
    """
    mesh = context.avals_in[0].sharding.mesh
    if mesh.manual_axes:
        return not mesh.are_all_axes_manual
    # Where JAX does not say how many, we assume all of them: what is compiled for many is right on one, too.
    devices: int = getattr(context.module_context.axis_context, "num_devices", jax.device_count())
    return devices > 1


def _device(context: Any, platform: str) -> Device | None:
    """The GPU that a pass is lowered for, or None where that is no CUDA GPU or not known."""
    if interpreted():
        return DEVICES["H100"]
    if platform != "cuda":
        return None
    # A mesh that is not there, as for compiling ahead of time, knows only the product name of its devices.
    abstract = context.avals_in[0].sharding.mesh.abstract_device
    if abstract is not None:
        return named(abstract.device_kind)
    devices = _devices(context)
    return facts(devices[0]) if devices else None


def _devices(context: Any) -> tuple[jax.Device, ...]:
    """The devices that the program is compiled for; none where JAX does not say."""
    return getattr(context.module_context.axis_context, "device_assignment", None) or ()


def _types(one_pass: Pass, *types: Any, call: Call, structure: Any) -> tuple[list[Any], Any]:
    arguments = jax.tree.unflatten(structure, types)
    results = one_pass.results(*arguments)
    if call.axis_name is not None and one_pass is FORWARD:
        # The statistics are sums over these axes.
        y, statistics = results
        summed = jax.make_jaxpr(lambda value: lax.psum(value, call.axis_name))(statistics.center)
        results = y, Statistics(*(summed.out_avals[0] for _ in statistics))
    effects: Any = set()
    if call.implementation == "pallas" and interpreted():
        # The callbacks of the interpreter have effects.
        kernel = functools.partial(_on_one_device, one_pass, "cpu", call.device or DEVICES["H100"], call)
        effects = jax.make_jaxpr(kernel)(*arguments).effects
    return [own.strip_weak_type() for own in jax.tree.leaves(results)], effects


def _batched(
    one_pass: Pass, values: Any, axes: Any, *, call: Call, structure: Any
) -> tuple[list[jax.Array], list[int]]:
    size = next(value.shape[axis] for value, axis in zip(values, axes, strict=True) if axis is not None)
    if axes[0] is None and call.implementation != "pallas":
        # JAX's own rules for the N-d formula compute only once what depends on nothing that is mapped.
        def run(*values: jax.Array) -> list[jax.Array]:
            return jax.tree.leaves(_on_many_devices(one_pass, call, *jax.tree.unflatten(structure, values)))

        results: list[jax.Array] = jax.vmap(run, axes)(*values)
        return results, [0] * len(results)

    def with_axis(value: jax.Array, axis: int | None) -> jax.Array:
        return jnp.broadcast_to(value, (size, *value.shape)) if axis is None else jnp.moveaxis(value, axis, 0)

    results = one_pass.primitive.bind(*map(with_axis, values, axes), call=call.with_mapped_axis(), structure=structure)
    return results, [0] * len(results)


@functools.partial(jax.jit, static_argnames=("one_pass", "call", "structure"))
def _compiled(*values: jax.Array, one_pass: Pass, call: Call, structure: Any) -> list[jax.Array]:
    results: list[jax.Array] = one_pass.primitive.bind(*values, call=call, structure=structure)
    return results


def _evaluated(one_pass: Pass, *values: jax.Array, call: Call, structure: Any) -> list[jax.Array]:
    # A pass is one operation, which is compiled like any other, under jax.disable_jit, too.
    with jax.disable_jit(False):
        results: list[jax.Array] = _compiled(*values, one_pass=one_pass, call=call, structure=structure)
    return results


def _let_checkify_see_nans(primitive: Primitive) -> None:
    """checkify has no public way to add a rule. Without one it does not see a NaN that is made in the norm."""
    with contextlib.suppress(ImportError, AttributeError):
        from jax._src import checkify

        checkify.error_checks[primitive] = functools.partial(checkify.nan_error_check, primitive)


def _ask_for_devices(primitive: Primitive) -> None:
    """JAX tells the devices only to primitives that ask, as its custom_partitioning does. It has no public way to."""
    with contextlib.suppress(ImportError, AttributeError):
        from jax._src import dispatch

        dispatch.prim_requires_devices_during_lowering.add(primitive)


FORWARD, BACKWARD = _Forward(), _Backward()

for _one_pass in (FORWARD, BACKWARD):
    _one_pass.primitive.def_impl(functools.partial(_evaluated, _one_pass))
    _one_pass.primitive.def_effectful_abstract_eval(functools.partial(_types, _one_pass))
    _let_checkify_see_nans(_one_pass.primitive)
    _ask_for_devices(_one_pass.primitive)
    batching.primitive_batchers[_one_pass.primitive] = functools.partial(_batched, _one_pass)
    for _platform in _PLATFORMS:
        mlir.register_lowering(_one_pass.primitive, _lowering(_one_pass, _platform), platform=_platform)
    mlir.register_lowering(_one_pass.primitive, _lowering(_one_pass, "other devices"))
