"""Trains a 3-D segmentation network on all devices of one host, or of several.

The batch is divided over the devices. Volumes too large for one device can be divided too: --space 4 spreads the depth
of every volume over four devices. The volumes are made from the seed; each process makes only what its devices hold.

    python examples/distributed.py                                    # all devices of this host, batch divided
    python examples/distributed.py --space 4 --size 128 --batch 2     # each volume over four devices
    XLA_FLAGS=--xla_force_host_platform_device_count=8 JAX_PLATFORMS=cpu python examples/distributed.py --space 4

On several hosts start it on each, with the number of the host; or with --cluster alone where JAX finds the others by
itself, as under Slurm, Open MPI and Kubernetes and on Cloud TPUs:

    python examples/distributed.py --coordinator 10.0.0.1:1234 --processes 2 --process 0     # on 10.0.0.1
    python examples/distributed.py --coordinator 10.0.0.1:1234 --processes 2 --process 1     # on the other host
"""

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

try:
    import flax.linen as nn
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

    from jaxnorm import InstanceNorm
except ModuleNotFoundError as error:
    sys.exit(f"distributed: {error.name} is not installed. Install what the demo needs: pip install 'jaxnorm[demo]'")

LEARNING_RATE, MOMENTUM = 0.1, 0.9
BALLS = 3
NOISE = 0.5
# By which the network halves a volume, once.
STRIDE = 2
# Of volumes (N, D, H, W, ...). Both axes of the mesh must divide them: where one divides the depth and the other
# nothing, XLA (jaxlib 0.12) adds up the gradients of convolution kernels over both, and they come out too large.
VOLUMES = PartitionSpec("data", "space")


class Segmenter(nn.Module):
    """Volumes (N, D, H, W, 1) to one logit per position, (N, D, H, W); D, H and W are even.

    The two finest levels of a U-Net (Ronneberger, Fischer, Brox 2015, https://arxiv.org/abs/1505.04597). Nothing in it
    knows of devices.
    """

    features: int = 8

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        fine = self._layer(x, self.features)
        coarse = self._layer(fine, 2 * self.features, stride=STRIDE)
        coarse = self._layer(coarse, 2 * self.features, residual=coarse)
        x = self._layer(jnp.concatenate([double(coarse), fine], axis=-1), self.features)
        return nn.Conv(1, (1, 1, 1))(x)[..., 0]

    def _layer(self, x: jax.Array, features: int, *, stride: int = 1, residual: jax.Array | None = None) -> jax.Array:
        x = nn.Conv(features, (3, 3, 3), stride, use_bias=False)(x)
        return InstanceNorm(activation=nn.relu)(x, residual=residual)


def double(x: jax.Array) -> jax.Array:
    """(N, D, H, W, C) to (N, 2D, 2H, 2W, C). Of a transposed convolution XLA would gather the divided input whole."""
    for axis in (1, 2, 3):
        x = jnp.repeat(x, STRIDE, axis=axis)
    return x


def main(argv: Sequence[str] | None = None) -> None:
    """Trains and prints the losses."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    _join(parser, arguments)
    _check_division(parser, arguments)
    shape = (jax.device_count() // arguments.space, arguments.space)
    mesh = jax.make_mesh(shape, ("data", "space"), axis_types=(AxisType.Auto, AxisType.Auto))
    # Every process knows the losses; one prints them.
    is_first = jax.process_index() == 0
    is_talking = is_first and not arguments.json

    if is_talking:
        print(f"{describe(mesh)}; {arguments.batch} volumes of {arguments.size}^3 positions per step")
    losses, times = [], []
    for loss in train(mesh, arguments):
        losses.append(loss)
        times.append(time.perf_counter())
        if is_talking:
            print(f"step {len(losses):4d}   loss {loss:.5f}", flush=True)
    # The first step compiles.
    rate = arguments.batch * (arguments.steps - 1) / (times[-1] - times[0])
    if is_talking:
        print(f"{rate:.1f} volumes/s, making them included")
    elif is_first:
        print(json.dumps({"mesh": dict(mesh.shape), "losses": losses, "volumes_per_second": rate}))


def describe(mesh: Mesh) -> str:
    """The mesh in words."""
    shape = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    return f"mesh {shape} of {mesh.devices.flat[0].device_kind} devices, processes: {jax.process_count()}"


def train(mesh: Mesh, arguments: argparse.Namespace) -> Iterator[float]:
    """Yields the loss of every step, over the whole batch.

    The step is written as for one device. jit divides it as the volumes are divided, and every device keeps all
    parameters: XLA adds up their gradients.
    """
    model, optimizer = Segmenter(), optax.sgd(LEARNING_RATE, MOMENTUM, nesterov=True)
    everywhere = NamedSharding(mesh, PartitionSpec())

    @functools.partial(jax.jit, out_shardings=everywhere)
    def initial_state(key: jax.Array) -> tuple[Any, Any]:
        params = model.init(key, jnp.zeros((1, STRIDE, STRIDE, STRIDE, 1)))
        return params, optimizer.init(params)

    @functools.partial(jax.jit, out_shardings=everywhere, donate_argnums=0)
    def step(state: tuple[Any, Any], images: jax.Array, masks: jax.Array) -> tuple[tuple[Any, Any], jax.Array]:
        def loss_of(params: Any) -> jax.Array:
            return optax.sigmoid_binary_cross_entropy(model.apply(params, images), masks).mean()

        params, momentum = state
        loss, gradients = jax.value_and_grad(loss_of)(params)
        updates, momentum = optimizer.update(gradients, momentum)
        return (optax.apply_updates(params, updates), momentum), loss

    # Of the generators of JAX "rbg" is the one that a CPU compiles in a second.
    state = initial_state(jax.random.key(arguments.seed, impl="rbg"))
    for images, masks in batches(mesh, arguments):
        state, loss = step(state, images, masks)
        yield float(loss)


def batches(mesh: Mesh, arguments: argparse.Namespace) -> Iterator[tuple[jax.Array, jax.Array]]:
    """For every step new images (N, D, H, W, 1) and masks (N, D, H, W), divided over the mesh.

    Here belongs your own reader of files. It is asked for the volumes and planes that this process holds, and no more.
    """
    shape = (arguments.batch, *(arguments.size,) * 3)
    sharding = NamedSharding(mesh, VOLUMES)
    volumes, planes = (positions_held(sharding, shape, axis) for axis in (0, 1))
    for step in range(arguments.steps):
        made = [make_planes(arguments.seed, step * shape[0] + volume, planes, shape[1:]) for volume in volumes]
        images, masks = (np.stack(part) for part in zip(*made, strict=True))
        yield (
            jax.make_array_from_process_local_data(sharding, images[..., None], (*shape, 1)),
            jax.make_array_from_process_local_data(sharding, masks, shape),
        )


def positions_held(sharding: NamedSharding, shape: tuple[int, ...], axis: int) -> list[int]:
    """The positions along an axis that the devices of this process hold."""
    parts = sharding.addressable_devices_indices_map(shape).values()
    return sorted({position for part in parts for position in range(*part[axis].indices(shape[axis]))})


def make_planes(seed: int, volume: int, planes: Sequence[int], shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Planes of a volume of that shape: image and mask, (planes, H, W) each, float32.

    Balls in noise. Contrast and brightness differ between volumes, as between scanners; instance norm takes them out.
    """
    # A seed for every plane: whoever makes a part makes the same as who makes all.
    seed_of_volume, *seeds_of_planes = np.random.SeedSequence((seed, volume)).spawn(1 + shape[0])
    rng = np.random.default_rng(seed_of_volume)
    position = (np.reshape(planes, (-1, 1, 1)), *np.ogrid[: shape[1], : shape[2]])
    mask = np.zeros((len(planes), *shape[1:]), bool)
    for _ in range(BALLS):
        center, radius = rng.uniform(0.2, 0.8, 3), rng.uniform(0.1, 0.25)
        mask |= sum((p / size - c) ** 2 for p, size, c in zip(position, shape, center, strict=True)) < radius**2
    noise = np.stack([np.random.default_rng(seeds_of_planes[plane]).normal(0, NOISE, shape[1:]) for plane in planes])
    contrast, brightness = rng.uniform(0.5, 5), rng.uniform(-5, 5)
    return (contrast * (mask + noise) + brightness).astype(np.float32), mask.astype(np.float32)


def _join(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Makes the devices of all processes one set, before JAX looks for devices."""
    numbers = (arguments.processes, arguments.process)
    if arguments.coordinator is None and numbers != (None, None):
        parser.error("--processes and --process need --coordinator HOST:PORT, which is process 0")
    if arguments.cluster:
        jax.distributed.initialize()
    elif arguments.coordinator is not None:
        if None in numbers or arguments.process >= arguments.processes:
            parser.error("--coordinator needs --processes P and --process, one of 0, 1, ... P - 1")
        jax.distributed.initialize(arguments.coordinator, *numbers)


def _check_division(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Every device gets as much as every other."""
    devices, space = jax.device_count(), arguments.space
    if devices % space:
        parser.error(f"--space must divide the number of devices, {devices}: got {space}")
    if arguments.batch % (devices // space):
        parser.error(
            f"--batch must be a multiple of {devices // space} (devices / space), so that each gets as many volumes: "
            f"got {arguments.batch}"
        )
    if arguments.size % (STRIDE * space):
        parser.error(
            f"--size must be a multiple of {STRIDE * space} ({STRIDE} x space), since the network halves the depth "
            f"that a device holds: got {arguments.size}"
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    number = functools.partial(parser.add_argument, metavar="N")
    number("--steps", type=_at_least(2), default=50, help="training steps (default %(default)s)")
    number("--batch", type=_at_least(1), default=8, help="volumes per step, on all devices (default %(default)s)")
    number("--size", type=_at_least(2), default=16, help="depth, height, width of a volume (default %(default)s)")
    number("--space", type=_at_least(1), default=1, help="devices that share a volume (default %(default)s)")
    number("--seed", type=_at_least(0), default=0, help="of everything random (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one line of JSON, at the end")
    several = parser.add_argument_group("several hosts")
    where = several.add_mutually_exclusive_group()
    where.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 is, and a free port there")
    where.add_argument("--cluster", action="store_true", help="JAX finds the other processes by itself")
    several.add_argument("--processes", type=_at_least(1), metavar="N", help="how many there are, with --coordinator")
    several.add_argument("--process", type=_at_least(0), metavar="N", help="which this is, from 0, with --coordinator")
    return parser


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}: got {text!r}")
        return int(text)

    return number


if __name__ == "__main__":
    main()
