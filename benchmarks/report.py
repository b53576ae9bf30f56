"""The one way in which all benchmarks take options, print tables, write files and draw."""

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import sys
from collections.abc import Iterable
from typing import Any

import jax
from rich.console import Console
from rich.progress import track

try:
    from tabulate import tabulate
except ModuleNotFoundError:
    sys.exit("The benchmarks need the dependency group bench: make .venv/bench")

_PACKAGES = ("jaxnorm", "jax", "jaxlib", "flax", "dm-haiku", "equinox", "numpy")


def parser(description: str | None, *, plot: bool = False) -> argparse.ArgumentParser:
    """The options that all benchmarks have; plot: also one for a picture."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--quick", action="store_true", help="tiny and inaccurate: only shows that all of it runs")
    options.add_argument("--markdown", type=_file, metavar="FILE", help="also write what is printed to this file")
    options.add_argument("--json", type=_file, metavar="FILE", help="write all figures to this file")
    if plot:
        options.add_argument("--plot", type=_file, metavar="FILE", help="draw a picture (.png, .svg, .pdf)")
    return options


def publish(chosen: argparse.Namespace, title: str, parts: list[str], facts: dict[str, Any], results: Any) -> None:
    """Prints the report and writes the files that the options name; results may hold dataclasses."""
    text = "\n\n".join([f"# {title}", describe(facts), *parts])
    print(text)
    if chosen.markdown:
        chosen.markdown.write_text(text + "\n")
    if chosen.json:
        chosen.json.write_text(json.dumps({"machine": facts, "results": results}, default=dataclasses.asdict) + "\n")


def machine() -> dict[str, Any]:
    """The processor and the versions of this process, without host names and paths."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    device = jax.devices()[0]
    return {
        "date": datetime.date.today().isoformat(),
        "device": _processor() if device.platform == "cpu" else device.device_kind,
        "cores": os.cpu_count(),
        "versions": versions,
    }


def describe(facts: dict[str, Any]) -> str:
    """One line."""
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return f"{facts['date']}; {facts['device']}, {facts['cores']} cores; {versions}."


def progress[Item](items: Iterable[Item], description: str) -> Iterable[Item]:
    """A bar on the standard error, because what goes to the standard output is Markdown."""
    return track(items, description=description, console=Console(stderr=True))


def table(header: list[str], rows: list[list[str]]) -> str:
    """Markdown, the first column aligned left and the others right."""
    columns = ("left", *("right",) * (len(header) - 1))
    return tabulate(rows, header, tablefmt="pipe", colalign=columns, disable_numparse=True)


def figure(width: float, height: float) -> Any:
    """An empty Matplotlib figure, in inches, whose text is legible where the picture is 660 pixels wide."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams["font.size"] = 9
    return Figure(figsize=(width, height), dpi=200, layout="constrained")


def _file(text: str) -> pathlib.Path:
    """We check this before the minutes of measuring, not after them."""
    path = pathlib.Path(text)
    if not path.parent.is_dir() or path.is_dir():
        raise argparse.ArgumentTypeError(f"must name a file in a folder that exists: got {text!r}")
    return path


def _processor() -> str:
    """Its name, with family and model where Linux tells them: the name alone may be only the maker's."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    if "model name" not in fields:
        return platform.machine()
    return f"{fields['model name']} (family {fields.get('cpu family')}, model {fields.get('model')})"
