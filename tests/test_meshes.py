"""On 8 virtual CPU devices: numbers, gradients, and what travels between the devices."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PYTHONPATH = os.pathsep.join([str(TESTS.parent / "benchmarks"), os.environ.get("PYTHONPATH", "")])


def reports(style):
    """A process of its own: the number of devices is fixed when JAX starts."""
    done = subprocess.run(
        [sys.executable, TESTS / "mesh_report.py", style],
        env=os.environ | {"PYTHONPATH": PYTHONPATH},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("style", "placements"),
    [
        ("auto", 17),
        ("auto, with the rule of the kernel", 17),
        ("explicit", 12),
        ("explicit data, auto space", 10),
        ("shard_map", 12),
        ("shard_map, check_vma=False", 4),
        ("shard_map over data alone", 10),
    ],
)
def test_every_placement(style, placements):
    found = reports(style)
    assert len(found) == placements
    for report in found:
        name = report["placement"]
        assert max(report["errors"].values()) <= 1, (name, report["errors"])
        assert report["stays"], name
        sent = [(kind, size) for kind, size in report["sent"] if [kind, size] not in report["sent_without_a_norm"]]
        assert {kind for kind, _ in sent} <= {"all-reduce"}, (name, sent)
        # At most four values per instance at once; the sums that stand for the results of an uneven call besides.
        assert all(size <= 4 * report["per_instance_bytes"] + 64 for _, size in sent), (name, sent)
