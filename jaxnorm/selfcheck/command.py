"""The command: finds out what is on this machine, runs the plan for it, and publishes the report."""

import dataclasses
import random
import time
from typing import Any

from rich.console import Console
from rich.progress import Progress

from jaxnorm.selfcheck import machine, plan, process, report
from jaxnorm.selfcheck.plan import Entry
from jaxnorm.selfcheck.process import Job

# Seconds after which no further case starts. On a GPU all numbers and races are run anyway: they are the proof.
_QUICK, _WHOLE, _WITHOUT_GPU = 110, 570, 45
_NO_GPU = """\
No CUDA GPU: this checks what implementation=None takes here, and the kernel in Pallas' interpreter on small shapes.
Not checked: clusters and groups of many blocks (the tests interpret them); that the kernel compiles for a GPU, \
that a GPU computes what the interpreter does, that thread blocks wait for each other there; and times."""


def selfcheck(
    json_file: str | None = None, markdown_file: str | None = None, *, quick: bool = False, seed: int | None = None
) -> int:
    """Checks, times if there is a GPU, prints, and writes files.

    Args:
      json_file, markdown_file: where to write the report, if anywhere.
      quick: two minutes instead of ten.
      seed: of the cases; None for a random one.

    Returns:
      The exit status: 0, or 1 if a number was wrong, a race was seen, or a case failed, died or hung.
    """
    console = Console()
    seed = random.randrange(2**31) if seed is None else seed
    facts = process.run(Job(machine.describe, {}, 120))
    outcome, gpu, _ = facts.pop("outcome"), facts.pop("gpu", None), facts.pop("seconds taken")
    if outcome != "done":
        console.print(f"This machine could not be described: {outcome}, {facts['reason']}", markup=False)
        return 1
    facts["gpu"] = None if gpu is None else dataclasses.asdict(gpu)
    for name, value in (facts | {"seed": seed}).items():
        console.print(f"{name}: {value}", highlight=False, markup=False)
    if gpu is None:
        console.print(_NO_GPU)
        entries, seconds = plan.without_gpu(seed), _WITHOUT_GPU
    else:
        entries, seconds = plan.on_gpu(seed, quick, gpu), _QUICK if quick else _WHOLE
    found: dict[str, Any] = {"selfcheck": report.EDITION, "quick": quick, "seed": seed, "machine": facts}
    found |= run(entries, seconds, must_run=() if gpu is None else ("numbers", "races"))
    return report.publish(found, json_file, markdown_file)


def run(entries: list[Entry], seconds: float, must_run: tuple[str, ...] = ()) -> dict[str, Any]:
    """The rows of every stage.

    Args:
      entries: to run, in order.
      seconds: after which no further one starts.
      must_run: stages of which all are run.
    """
    start, interrupted = time.monotonic(), False
    rows: dict[str, Any] = {stage: [] for stage in report.STAGES}
    with Progress(transient=True) as progress:
        task = progress.add_task("", total=len(entries))
        for stage, row, job in entries:
            progress.update(task, description=f"{stage}: {row['case']}"[:60], advance=1)
            found = {"outcome": "not run", "reason": row.get("reason", "interrupted")}
            if job is not None and not interrupted:
                if time.monotonic() - start > seconds and stage not in must_run:
                    found["reason"] = f"the {seconds:.0f} s were over"
                else:
                    try:
                        found = process.run(job)
                    except KeyboardInterrupt:
                        interrupted = True
            rows[stage].append(row | found)
    return rows | {"seconds": round(time.monotonic() - start)}
