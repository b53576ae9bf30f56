"""python -m jaxnorm selfcheck: is the kernel right on this machine, and how fast is it?

With a CUDA GPU: numbers against float64, races, times and a sweep of tiles. Without one: the kernel in Pallas'
interpreter, on small shapes. Every case has a process of its own.
"""

import json
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from jaxnorm.gpu.devices import Device
from jaxnorm.report import plan, process, proof, tables
from jaxnorm.report.plan import Entry
from jaxnorm.report.process import Job

_STAGES = ("numbers", "races", "times", "sweep")
# Seconds after which no further case starts. On a GPU numbers and races are run all the same: they are the proof.
_QUICK, _WHOLE, _WITHOUT_GPU = 110, 570, 45
_NO_GPU = """\
No CUDA GPU: the kernel runs in Pallas' interpreter, on small shapes.
Not checked: clusters of more than 2 (the tests interpret them), that it compiles for a GPU, that a GPU computes what \
the interpreter computes, that thread blocks wait for each other there, and its speed."""


def selfcheck(
    json_file: str | None = None, markdown_file: str | None = None, *, quick: bool = False, seed: int | None = None
) -> int:
    """Checks, times where there is a GPU, prints, and writes the files that were asked for.

    Args:
      json_file, markdown_file: where to write the report, if anywhere.
      quick: two minutes instead of ten.
      seed: of the cases; None draws one.

    Returns:
      The exit status: 0, or 1 if a number was wrong, a race was seen, or a case failed, died or hung.
    """
    console = Console()
    seed = random.randrange(2**31) if seed is None else seed
    found = process.run(Job("jaxnorm.report.machine:describe", {}, 120))
    if found.result is None:
        console.print(f"What is on this machine could not be found out: {found.outcome}, {found.reason}", markup=False)
        return 1
    facts = found.result
    gpu = facts["gpu"]
    console.print(tables.machine(facts), f"seed: {seed}", highlight=False)
    if gpu is None:
        console.print(_NO_GPU)
        entries, seconds = plan.without_gpu(seed), _WITHOUT_GPU
    else:
        device = Device(**gpu | {"compute_capability": tuple(gpu["compute_capability"])})
        entries, seconds = plan.on_gpu(seed, quick, device), _QUICK if quick else _WHOLE
    report = {"selfcheck": proof.EDITION, "quick": quick, "seed": seed, "machine": facts}
    report |= run(entries, seconds, must_run=() if gpu is None else ("numbers", "races"))
    return publish(report, json_file, markdown_file)


def run(entries: list[Entry], seconds: float, must_run: tuple[str, ...] = ()) -> dict[str, Any]:
    """The rows of every stage.

    Args:
      entries: to run, in order.
      seconds: after which no further one starts.
      must_run: stages of which all are run.
    """
    start, interrupted = time.monotonic(), False
    rows: dict[str, Any] = {stage: [] for stage in _STAGES}
    with Progress(transient=True) as progress:
        task = progress.add_task("", total=len(entries))
        for stage, row, job in entries:
            progress.update(task, description=f"{stage}: {row['case']}"[:60], advance=1)
            late = time.monotonic() - start > seconds and stage not in must_run
            if job is None or late or interrupted:
                reason = row.get("reason") or ("interrupted" if interrupted else f"the {seconds:.0f} s were over")
                rows[stage].append(row | {"outcome": "not run", "reason": reason})
                continue
            try:
                rows[stage].append(row | _ended(process.run(job)))
            except KeyboardInterrupt:
                interrupted = True
                rows[stage].append(row | {"outcome": "not run", "reason": "interrupted"})
    return rows | {"seconds": round(time.monotonic() - start)}


def _ended(ended: process.Ended) -> dict[str, Any]:
    """What the row learns."""
    found: dict[str, Any] = {"outcome": ended.outcome, "seconds taken": round(ended.seconds, 1)}
    found |= {"reason": ended.reason} if ended.reason else {}
    return found | (ended.result or {})


def publish(report: dict[str, Any], json_file: str | None, markdown_file: str | None) -> int:
    """Prints the tables and the verdict, writes the files, and returns the exit status."""
    report["verdict"] = proof.verdict(report)
    console = Console()
    for table in tables.tables(report):
        console.print(table)
    rows = [row for stage in _STAGES for row in report[stage]]
    outcomes = Counter(row["outcome"] for row in rows)
    counted = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items())
    lines = [f"{counted} in {report['seconds']} s, seed {report['seed']}", f"numbers and races: {report['verdict']}"]
    lines += [f"proven, for jaxnorm/gpu/devices.py: {tuple(way)}" for way in sorted(proof.ways_proven(report))]
    for line in lines:
        console.print(line, highlight=False, markup=False)
    if json_file is not None:
        Path(json_file).write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    if markdown_file is not None:
        head = [f"# jaxnorm selfcheck on {report['machine']['device']}", *lines]
        head += [f"* {name}: {value}" for name, value in report["machine"].items()]
        Path(markdown_file).write_text(tables.markdown(report, head))
    return int(bool(set(outcomes) - {"right", "done", "not run"}))
