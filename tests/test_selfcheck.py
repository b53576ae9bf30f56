"""jaxnorm selfcheck: what it runs, and that it reports what is wrong."""

import copy
import dataclasses
import json
import time
from pathlib import Path

import faults
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import exhaustive

from jaxnorm.__main__ import main
from jaxnorm.gpu.devices import DEVICES, PROVEN, KernelKind
from jaxnorm.gpu.tile import Tile
from jaxnorm.selfcheck import cases, command, machine, plan, races, report, times
from jaxnorm.selfcheck.cases import Case
from jaxnorm.selfcheck.plan import Entry
from jaxnorm.selfcheck.process import Job, run

ROOT = Path(__file__).parents[1]
CASE = Case((2, 6, 5, 8), -1, "float32", residual=True, activation="tanh", offset=3.0, implementation="xla", seed=5)


def entry(fault, limit=120.0, **arguments):
    return Entry("numbers", {"case": "some", "kind": "none", "kinds": []}, Job(fault, arguments, limit))


def run_entries(*entries, seconds=120, **options):
    found = command.run(list(entries), seconds, **options)
    return found | {"seed": 0, "quick": True, "selfcheck": report.EDITION, "machine": {"gpu": None, "device": "cpu"}}


def row_of(fault, **arguments):
    """The row that a fault gets, the exit status, and the report as Markdown."""
    found = run_entries(entry(fault, **arguments))
    status = report.publish(found, None, None)
    (row,) = found["numbers"]
    return row, status, report.markdown(found, [found["verdict"]])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "outcome", "reason"),
    [
        (faults.dies, "died", "SIGABRT: CUDA_ERROR_LAUNCH_FAILED [from C++]"),
        (faults.leaves, "died", "exit status 3: it printed nothing"),
        (faults.refuses, "failed", "RuntimeError: cannot launch <object>"),
    ],
)
def test_a_case_that_ends_badly_is_a_row_with_the_reason(fault, outcome, reason):
    row, status, text = row_of(fault)
    assert (row["outcome"], row["reason"]) == (outcome, reason)
    assert status == 1
    assert f"\n1 {outcome}\n" in text
    assert f"{outcome.upper()}: {reason}" in text


@pytest.mark.slow
def test_a_case_that_hangs_is_killed():
    row, status, text = row_of(faults.hangs, limit=3)
    assert (row["outcome"], row["reason"]) == ("hung", "not over after 3 s, then killed")
    assert status == 1
    assert "HUNG" in text


@pytest.mark.slow
def test_the_rest_is_run_anyway():
    found = run_entries(*(entry(fault) for fault in (faults.dies, faults.refuses, faults.fine)))
    assert [row["outcome"] for row in found["numbers"]] == ["died", "failed", "right"]
    assert report.verdict(found) == "1 died, 1 failed"


@pytest.mark.slow
def test_what_was_not_run_is_one_line_and_proves_nothing(capsys):
    late = run_entries(entry(faults.fine), entry(faults.fine), Entry("races", entry(faults.fine).row, None), seconds=-1)
    assert [row["outcome"] for row in late["numbers"] + late["races"]] == ["not run"] * 3
    assert report.publish(late, None, None) == 0
    assert late["verdict"] == "nothing was run, 3 not run"
    printed = capsys.readouterr().out
    assert "not run: 2 (the -1 s were over), 1 (interrupted)" in printed
    assert "outcome" not in printed
    must = run_entries(
        entry(faults.fine), Entry("races", entry(faults.fine).row, None), seconds=-1, must_run=("numbers",)
    )
    assert report.verdict(must) == "all right, 1 not run" != report.ALL_RIGHT


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{"activation": "none", "dtype": "bfloat16"}, {"residual": False, "x64": True, "group_size": 4}],
    ids=str,
)
def test_right_numbers_are_right(changes):
    case = dataclasses.replace(CASE, **changes)
    row, status, _ = row_of(faults.wrong, case=case, change="none")
    assert (row["outcome"], status) == ("right", 0), row
    assert set(row["results"]) == {"y", "dx", "dgamma", "dbeta", *["dresidual"] * case.residual}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        pytest.param("scaled", {"y"}, marks=exhaustive),
        ("not a number", {"y"}),
        ("overwritten", {"y"}),
        ("wrong gradient", {"dx", "dgamma", "dbeta", "dresidual"}),
    ],
)
def test_wrong_numbers_are_wrong(change, wrong):
    row, status, text = row_of(faults.wrong, case=CASE, change=change)
    assert (row["outcome"], status) == ("wrong", 1)
    too_large = {name for name, found in row["results"].items() if not float(found["error"]) <= found["limit"]}
    assert too_large >= wrong
    assert ("y" in too_large) == ("y" in wrong)
    assert "WRONG" in text
    assert ("nan" in text) == (change == "not a number")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrong", "differing"),
    [
        (None, {"nothing": 0, "another stream": 0}),
        pytest.param(30, {"nothing": 1, "another stream": 0}, marks=exhaustive),
        (70, {"nothing": 0, "another stream": 1}),
    ],
)
def test_a_race_is_seen(wrong, differing):
    row, status, text = row_of(faults.race, case=CASE, repeats=40, wrong=wrong)
    assert row["differing"] == differing
    assert row["runs"] == 80
    assert (row["outcome"], status) == (("right", 0) if wrong is None else ("race", 1)), row
    assert ("RACE" in text) == (wrong is not None)


def test_repeats_are_compared_bit_by_bit():
    """A NaN equals the same NaN, and -0.0 differs from 0.0; the first two runs are not compared with anything."""
    # The third run differs, which is the first one that is compared.
    signs = jnp.array([1, 1, -1, -1, 1, 1, 1], jnp.float32)

    def count(flip):
        runs = iter(range(7))

        def seen(_):
            return np.float32(signs[next(runs)] if flip else 1)

        def step(x):
            sign = jax.pure_callback(seen, jax.ShapeDtypeStruct((), jnp.float32), x[0])
            return {"zero": 0 * x[0] * sign, "nan": x * jnp.nan}

        stacked = jnp.arange(1, 7, dtype=jnp.float32).reshape(2, 3)
        return int(jax.jit(lambda stacked: races.repeat(step, stacked, 7, busy=False))(stacked)[1])

    assert count(flip=False) == 0
    assert count(flip=True) == 2


def test_the_loop_of_the_races_computes_inside():
    run = jax.jit(lambda stacked, n: races.repeat(jnp.tanh, stacked, n, busy=False))
    text = run.lower(jnp.ones((2, 8)), 3).compile().as_text()
    assert " while(" in text
    (computed,) = [line for line in text.splitlines() if " tanh(" in line]
    assert computed not in text[text.index("ENTRY") :].splitlines()


# What is run.


@pytest.mark.slow
@pytest.mark.parametrize("name", ["H100", "A100", pytest.param("RTX 5090", marks=exhaustive)])
def test_a_plan_has_every_kind_and_every_option(name):
    device, seed = DEVICES[name], 0
    entries = plan.on_gpu(seed, False, device)
    assert entries == plan.on_gpu(seed, False, device) != plan.on_gpu(seed + 1, False, device)
    assert {entry.stage for entry in entries} == set(report.STAGES)
    drawn = {stage: [e.job.arguments["case"] for e in entries if e.stage == stage] for stage in ("numbers", "races")}
    wanted = {kind[:2] for kind in cases.kinds(device)}
    for found in drawn.values():
        assert {cases.kind_of(tile)[:2] for case in found for tile in case.tiles if isinstance(tile, Tile)} == wanted
    by_kernel = [case for case in drawn["numbers"] if case.implementation == "pallas"]
    assert {case.implementation for case in drawn["numbers"]} == {"pallas", "xla"}
    clusters = {
        tile.blocks_per_instance for case in by_kernel for tile in case.tiles if tile.synchronization == "cluster"
    }
    assert clusters == ({2, 4, 8} if device.compute_capability >= (9, 0) else set())
    for kind in wanted:
        of_kind = [case for case in by_kernel if {cases.kind_of(tile)[:2] for tile in case.tiles} == {kind}]
        assert {case.dtype for case in of_kind} == set(cases.DTYPES)
        assert {case.activation for case in of_kind} == set(cases.ACTIVATIONS)
        assert {case.residual for case in of_kind} == {False, True}
    assert {case.x64 for case in by_kernel} == {False, True}
    assert {case.group_size > 1 for case in by_kernel} == {False, True}
    assert {tile.ragged for case in by_kernel for tile in case.tiles} == {False, True}
    # The tiles are for the GPU or a smaller one.
    for tile in (tile for case in by_kernel for tile in case.tiles):
        assert tile.shared_memory <= device.shared_memory
        assert tile.synchronization != "group" or tile.blocks_per_instance <= device.sm_count


@pytest.mark.slow
@pytest.mark.parametrize("quick", [False, True])
def test_a_plan_has_stores_that_the_interpreter_clips(quick):
    """Rows of 16 bytes, with a ragged end before the next sample: see ENDS."""
    entries = [e for e in plan.on_gpu(0, quick, DEVICES["H100"]) if e.stage == "numbers"]
    drawn = [case for case in (e.job.arguments["case"] for e in entries) if case.implementation == "pallas"]
    assert {((4, 64, 34, 34), "float32"), ((1, 3, 30, 30), "float32"), ((8, 16, 34, 36), "bfloat16")} <= {
        (case.shape, case.dtype) for case in drawn
    }
    narrow = [tile for case in drawn for tile in case.tiles if tile.row_bytes == 16 and tile.copies != "span"]
    assert sum(tile.ragged and tile.shape[0] > 1 for tile in narrow) >= (4 if quick else 8)


@pytest.mark.slow
def test_kinds_are_all_that_there_are():
    """A kind that is new to the kernel must be checked, too."""
    rng = np.random.default_rng(0)
    for device in (DEVICES["H100"], DEVICES["A100"]):
        known = {kind[:2] for kind in cases.kinds(device)}
        for kind in cases.kinds(device) * 100:
            options = {"dtype": str(rng.choice(cases.DTYPES))}
            case = cases.guess(rng, kind, options, device, cases.Size((2**8, 2**24), (1, 10**9)))
            assert {cases.kind_of(tile)[:2] for tile in case.tiles if isinstance(tile, Tile)} <= known


@pytest.mark.slow
def test_quick_is_less():
    quick, whole = (plan.on_gpu(1, quick, DEVICES["H100"]) for quick in (True, False))
    assert {entry.stage for entry in quick} == {entry.stage for entry in whole}
    assert len(quick) < len(whole) / 2


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_without_a_gpu(tmp_path, capsys, monkeypatch):
    """The default path and the kernel interpreted; and what was not checked is printed."""
    planned = plan.without_gpu(3)
    assert [entry.row["kind"] for entry in planned].count("default") == 6
    assert any(entry.job.arguments["case"].group_size > 1 for entry in planned)
    interpreted = next(entry for entry in planned if entry.job.arguments.get("interpreted"))
    monkeypatch.setattr(plan, "without_gpu", lambda seed: [planned[0], interpreted, planned[-1]._replace(job=None)])
    monkeypatch.setattr(command, "_WITHOUT_GPU", 300)
    table, figures = tmp_path / "table.md", tmp_path / "figures.json"
    assert main(["selfcheck", "--seed", "3", "--json", str(figures), "--markdown", str(table)]) == 0
    printed = capsys.readouterr().out
    assert "No CUDA GPU" in printed
    assert "seed: 3" in printed
    found = json.loads(figures.read_text())
    assert [row["outcome"] for row in found["numbers"]] == ["right"] * 2 + ["not run"]
    assert found["verdict"] == "all right, 1 not run"
    assert found["machine"]["gpu"] is None
    assert not report.proven(found)
    assert table.read_text().count("| right") == 2


# What is proven.

REPORT = {
    "selfcheck": report.EDITION,
    "quick": False,
    "machine": {"gpu": {"compute_capability": [9, 0], "sm_count": 132, "shared_memory": 227 * 1024}},
    "numbers": [
        {"kinds": [["bulk", "cluster"]] * 2, "outcome": "right"},
        {"kinds": [["bulk", "alone"]] * 2, "outcome": "right"},
        {"kinds": [["bulk", "group"], ["bulk", "alone"]], "outcome": "right"},
        {"kinds": [], "outcome": "right"},
    ],
    "races": [{"kinds": [["bulk", "cluster"]] * 2, "outcome": "right"}],
}


def test_a_kind_is_proven_by_numbers_and_races_of_both_passes():
    assert report.proven(REPORT) == {KernelKind((9, 0), "bulk", "cluster")}


@pytest.mark.parametrize(
    "change",
    [
        lambda found: found["numbers"][1].update(outcome="wrong"),
        lambda found: found["races"][0].update(outcome="race"),
        lambda found: found["races"][0].update(outcome="not run"),
        lambda found: found.update(races=[]),
        lambda found: found.update(quick=True),
        lambda found: found.update(selfcheck=report.EDITION - 1),
        lambda found: found["machine"].update(gpu=None),
    ],
)
def test_nothing_else_is_proven(change):
    found = copy.deepcopy(REPORT)
    change(found)
    assert not report.proven(found)


def test_every_entry_of_the_table_has_its_report():
    for kind, name in PROVEN.items():
        found = json.loads((ROOT / "benchmarks" / "results" / name).read_text())
        assert kind in report.proven(found), (kind, name)


# How time is taken, as far as a CPU shows it.


@pytest.mark.slow
def test_every_buffer_is_read_once_and_no_call_is_dropped_or_moved():
    buffers = times.make_buffers((4, 8), "float32", 5 * 4 * 8 * 4 - 1)
    assert len({float(buffer[0, 0]) for buffer in buffers}) == len(buffers) == 5
    text = times.over(jnp.tanh).lower(buffers).compile().as_text()
    assert " while(" not in text
    assert len([line for line in text.splitlines() if " tanh(" in line]) == 5
    assert text[text.index("ENTRY") :].count(" parameter(") == 5
    for got, buffer in zip(times.over(jnp.tanh)(buffers), buffers, strict=True):
        np.testing.assert_array_equal(got, jnp.tanh(buffer))


def test_buffers_exceed_every_cache():
    for shape, _ in cases.NETWORKS.values():
        for dtype in ("float32", "bfloat16"):
            size = int(np.prod(shape)) * jnp.dtype(dtype).itemsize
            assert min(times.MOST_BUFFERS, times.BUFFER_BYTES // size + 1) * size > times.BUFFER_BYTES


@pytest.mark.slow
def test_rows_of_times(monkeypatch):
    """A row per pass and contender, and a copy; by the host's clock and without the kernel here."""

    def seconds(function, buffers):
        start = time.perf_counter()
        jax.block_until_ready(function(buffers))
        return time.perf_counter() - start

    found = times.contenders((1, 4, 4, 8), -1, "relu")
    assert list(found) == ["jaxnorm, kernel", "jaxnorm, plain XLA", "Flax"]
    del found["jaxnorm, kernel"]
    monkeypatch.setattr(times, "_seconds", seconds)
    monkeypatch.setattr(times, "contenders", lambda *given: found)
    row = times.times(name="tiny", shape=(1, 4, 4, 8), channel_axis=-1, dtype="float32", buffer_bytes=1024)
    passes = [("forward", "copy"), *((each, name) for name in found for each in ("forward", "training step"))]
    assert [(each["pass"], each["contender"]) for each in row["times"]] == passes
    for each in row["times"]:
        units = {"forward": 2, "training step": 5}[each["pass"]]
        assert each["bytes per second"] == pytest.approx(units * 4 * 4 * 8 * 4 / each["seconds"])
        assert each["low"] <= each["seconds"] <= each["high"]
        assert each["share of copy"] > 0
    assert row["times"][0]["share of copy"] == pytest.approx(1)
    shown = run_entries() | {"times": [row | {"case": "tiny"}]}
    assert report.markdown(shown, []).count("| tiny") == len(passes)


@pytest.mark.slow
def test_jobs_find_the_package_of_the_clone():
    found = run(Job(machine.describe, {}, 120))
    assert (found["outcome"], found["gpu"]) == ("done", None)
