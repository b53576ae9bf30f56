"""What the benchmarks print and write: Markdown and JSON, with the machine, the versions and the date."""

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
from collections.abc import Iterable
from typing import Any

import jax
from rich.console import Console
from rich.progress import track
from tabulate import tabulate

_PACKAGES = ("jaxnorm", "jax", "jaxlib", "flax", "dm-haiku", "equinox", "numpy")


def machine() -> dict[str, Any]:
    """Of this process. Neither host names nor paths."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    device = jax.devices()[0]
    return {
        "date": datetime.date.today().isoformat(),
        "device": _cpu_model() if device.platform == "cpu" else device.device_kind,
        "cores": os.cpu_count(),
        "versions": versions,
    }


def describe(machine: dict[str, Any]) -> str:
    """One line."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return f"{machine['date']}; {machine['device']}, {machine['cores']} cores; {versions}"


def progress[Item](items: Iterable[Item], description: str) -> Iterable[Item]:
    """With a bar on the standard error: what goes to the standard output is Markdown."""
    return track(items, description=description, console=Console(stderr=True))


def table(header: list[str], rows: list[list[str]]) -> str:
    """Markdown, the first column to the left and numbers to the right."""
    columns = ("left", *("right",) * (len(header) - 1))
    # The cells are formatted already.
    return tabulate(rows, header, tablefmt="pipe", colalign=columns, disable_numparse=True)


def figure(width: float, height: float) -> Any:
    """An empty Matplotlib figure, in inches, whose text is legible where the picture is 660 pixels wide."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams["font.size"] = 9
    return Figure(figsize=(width, height), dpi=200, layout="constrained")


def add_output_options(parser: argparse.ArgumentParser, *, plot: bool = True) -> None:
    parser.add_argument("--markdown", type=_file, metavar="FILE", help="write what is printed there too")
    parser.add_argument("--json", type=_file, metavar="FILE", help="write all figures there")
    if plot:
        parser.add_argument("--plot", type=_file, metavar="FILE", help="draw a picture there (.png, .svg, .pdf)")


def publish(arguments: argparse.Namespace, text: str, figures: dict[str, Any]) -> None:
    """Prints the text, and writes what the output options name; figures may hold dataclasses."""
    print(text)
    if arguments.markdown:
        arguments.markdown.write_text(text + "\n")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, default=dataclasses.asdict) + "\n")


def _file(text: str) -> pathlib.Path:
    """Asked before the minutes of measuring, not after them."""
    path = pathlib.Path(text)
    if not path.parent.is_dir() or path.is_dir():
        raise argparse.ArgumentTypeError(f"must name a file in a folder that exists: got {text!r}")
    return path


def _cpu_model() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()
