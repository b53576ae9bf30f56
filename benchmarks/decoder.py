"""What group norm costs in a training step of the decoder of an autoencoder, compared with Flax.

    python -m benchmarks.decoder            # 512 channels at 16 x 16 to 128 at 64 x 64
    python -m benchmarks.decoder --small    # a quarter of the channels

The decoder is that of latent diffusion (Rombach et al. 2022) without attention: ResNet blocks of group norm with 32
groups, SiLU and convolutions. It is trained without norms, with Flax's layer, with its stable variance, and with
jaxnorm's. Steps take turns and are compared round by round.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import jaxnorm
from benchmarks import report
from benchmarks.contenders import BASELINE, JAXNORM, STABLE, waiting
from benchmarks.models import NO_NORM, gradient_descent
from benchmarks.turns import Spread, ratios, take_turns, timed

# silu(norm(x)); called inside a network, where it makes its layer.
Layer = Callable[[jax.Array], jax.Array]


def layers(groups: int) -> dict[str, Layer]:
    """The norm and the activation, as users of each library write them."""

    def flax(x: jax.Array, *, use_fast_variance: bool) -> jax.Array:
        return nn.silu(nn.GroupNorm(groups, use_fast_variance=use_fast_variance)(x))

    def fused(x: jax.Array) -> jax.Array:
        return jaxnorm.GroupNorm(groups, activation=nn.silu)(x)

    return {
        NO_NORM: nn.silu,
        BASELINE: functools.partial(flax, use_fast_variance=True),
        STABLE: functools.partial(flax, use_fast_variance=False),
        JAXNORM: fused,
    }


class Decoder(nn.Module):
    """(N, H, W, 4) to (N, 4 H, 4 W, 3).

    Attributes:
      norm: before each convolution, with the activation.
      features: channels per level, from the coarsest; each level below has twice the side.
      blocks: per level.
    """

    norm: Layer
    features: tuple[int, ...]
    blocks: int = 2

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(self.features[0], (3, 3))(x)
        for level, features in enumerate(self.features):
            if level > 0:
                x = nn.Conv(x.shape[-1], (3, 3))(jnp.repeat(jnp.repeat(x, 2, 1), 2, 2))
            for _ in range(self.blocks):
                x = self.block(x, features)
        return nn.Conv(3, (3, 3))(self.norm(x))

    def block(self, x: jax.Array, features: int) -> jax.Array:
        y = nn.Conv(features, (3, 3))(self.norm(x))
        y = nn.Conv(features, (3, 3))(self.norm(y))
        return y + (x if x.shape[-1] == features else nn.Conv(features, (1, 1))(x))


@dataclass(frozen=True)
class Result:
    """A training step with one kind of layer.

    Attributes:
      seconds: of the step.
      ratio: of its time to that with Flax's layer.
      added: seconds by which the norms make it longer.
      temporary: bytes beside arguments and results.
    """

    layer: str
    seconds: Spread
    ratio: Spread
    added: Spread
    temporary: int


def measure(features: tuple[int, ...], side: int, groups: int, seconds: float) -> list[Result]:
    """A result per kind of layer."""
    x = jax.random.normal(jax.random.key(0), (1, side, side, 4))
    scale = 2 ** (len(features) - 1)
    target = jax.random.normal(jax.random.key(1), (1, scale * side, scale * side, 3))
    compiled: dict[str, Any] = {}
    calls = {}
    for name, layer in layers(groups).items():
        model = Decoder(layer, features)
        given = jax.jit(model.init)(jax.random.key(2), x), x, target
        compiled[name] = jax.jit(gradient_descent(model)).lower(*given).compile()
        calls[name] = functools.partial(timed, waiting(compiled[name], *given))
    steps = take_turns(calls, seconds, 5)
    return [
        Result(
            name,
            Spread.of(taken),
            ratios(taken, steps[BASELINE]),
            Spread.of([a - b for a, b in zip(taken, steps[NO_NORM], strict=True)]),
            compiled[name].memory_analysis().temp_size_in_bytes,
        )
        for name, taken in steps.items()
    ]


def main(argv: list[str] | None = None) -> None:
    """Measures, prints, writes."""
    parser = report.parser(__doc__)
    parser.add_argument("--small", action="store_true", help="a quarter of the channels")
    parser.add_argument("--seconds", type=float, default=60, help="for all rounds (default 60)")
    chosen = parser.parse_args(argv)
    features = (8, 4) if chosen.quick else (128, 64, 32) if chosen.small else (512, 256, 128)
    side, groups = (2, 2) if chosen.quick else (16, 8 if chosen.small else 32)
    results = measure(features, side, groups, 0 if chosen.quick else chosen.seconds)
    rows = [
        [
            r.layer,
            r.seconds.format(".1f", 1e3),
            r.ratio.format(),
            "" if r.layer == NO_NORM else r.added.format(".1f", 1e3),
            "" if r.layer == NO_NORM else f"{r.added.median / r.seconds.median:.0%}",
            f"{r.temporary / 2**20:.1f}",
        ]
        for r in results
    ]
    header = ["", "step, ms", "of Flax's", "added by norms, ms", "norms' share", "temporary memory, MiB"]
    parts = [
        f"A training step in float32 on one image of {side * 2 ** (len(features) - 1)} pixels a side; {features} "
        f"channels, {groups} groups. Median (quartiles) over the rounds.",
        report.table(header, rows),
    ]
    report.publish(chosen, "Group norm in the decoder of an autoencoder", parts, report.machine(), results)


if __name__ == "__main__":
    main()
