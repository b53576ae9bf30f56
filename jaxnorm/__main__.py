"""The command line: jaxnorm explain | selfcheck, or python -m jaxnorm."""

import argparse
import sys
from typing import get_args

import jax
import jax.numpy as jnp

from jaxnorm.arguments import Implementation
from jaxnorm.explanation import explain
from jaxnorm.gpu.devices import DEVICES
from jaxnorm.version import __version__

EXAMPLES = """\
examples:
  jaxnorm explain 8x64x64x256 --channels-last --activation relu
  jaxnorm explain 8x256x64x64 --dtype bfloat16 --residual --implementation pallas --device H100
  jaxnorm explain 8x64x64x256 --channels-last --groups 32 --activation silu
  jaxnorm selfcheck --quick --markdown report.md
"""


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        status: int = arguments.run(arguments)
    except (TypeError, ValueError) as error:
        print(f"jaxnorm: {error}", file=sys.stderr)
        return 2
    return status


def _parser() -> argparse.ArgumentParser:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="jaxnorm", description="Instance and group normalization for JAX.", epilog=EXAMPLES, formatter_class=style
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    what = "what a call would run on a GPU, and why; needs no GPU"
    command = commands.add_parser("explain", help=what, description=what, epilog=EXAMPLES, formatter_class=style)
    command.add_argument("shape", type=_shape, help="input shape, e.g. 8x64x64x256 (batch first)")
    command.add_argument(
        "--dtype", default="float32", choices=["float16", "bfloat16", "float32"], help="input dtype; default: float32"
    )
    command.add_argument(
        "--channels-last", action="store_true", help="the shape is (N, *spatial, C); default: (N, C, *spatial)"
    )
    command.add_argument(
        "--groups", type=int, metavar="N", help="group norm with so many groups; default: instance norm"
    )
    command.add_argument("--residual", action="store_true", help="the call adds a residual")
    command.add_argument("--activation", type=_activation, metavar="NAME", help="activation from jax.nn, e.g. relu")
    command.add_argument(
        "--implementation", choices=get_args(Implementation), help="as in instance_norm; default: automatic"
    )
    command.add_argument(
        "--device", metavar="NAME", help=f"GPU, one of {', '.join(DEVICES)}; default: the current device"
    )
    command.set_defaults(run=_explain)

    what = "check jaxnorm and its GPU kernel on this machine, and time them; 10 minutes, 1 without a GPU"
    command = commands.add_parser("selfcheck", help=what, description=what, epilog=EXAMPLES, formatter_class=style)
    command.add_argument("--quick", action="store_true", help="2 minutes: fewer cases")
    command.add_argument("--seed", type=int, help="seed of the cases, to repeat a run; default: random, and printed")
    command.add_argument("--json", metavar="FILE", help="also write the report to FILE")
    command.add_argument("--markdown", metavar="FILE", help="also write the tables to FILE")
    command.set_defaults(run=_selfcheck)
    return parser


def _explain(arguments: argparse.Namespace) -> int:
    explanation = explain(
        jax.ShapeDtypeStruct(arguments.shape, jnp.dtype(arguments.dtype)),
        num_groups=arguments.groups,
        channel_axis=-1 if arguments.channels_last else 1,
        residual=arguments.residual,
        activation=arguments.activation,
        implementation=arguments.implementation,
        device=arguments.device,
    )
    if arguments.implementation == "pallas" and explanation.device is None:
        raise ValueError("no CUDA GPU here: use --device H100")
    print(explanation)
    return 0


def _selfcheck(arguments: argparse.Namespace) -> int:
    from jaxnorm.selfcheck.command import selfcheck

    return selfcheck(arguments.json, arguments.markdown, quick=arguments.quick, seed=arguments.seed)


def _shape(text: str) -> tuple[int, ...]:
    sizes = text.lower().split("x")
    # int() would take signs, spaces and underscores as well.
    if not all(size.isascii() and size.isdigit() for size in sizes):
        raise argparse.ArgumentTypeError(f"a shape is numbers with x between them, 8x64x64x256: got {text!r}")
    return tuple(map(int, sizes))


def _activation(name: str) -> object:
    function = getattr(jax.nn, name, None)
    if not callable(function):
        raise argparse.ArgumentTypeError(f"no such function in jax.nn: {name!r}")
    return function


if __name__ == "__main__":
    sys.exit(main())
