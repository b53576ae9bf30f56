"""python -m jaxnorm selfcheck: what it runs, and that it says so when something is wrong."""

import copy
import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnorm.__main__ import main
from jaxnorm.gpu import devices
from jaxnorm.gpu.devices import DEVICES, KernelKind
from jaxnorm.gpu.tile import Tile
from jaxnorm.report import cases, plan, proof, races, selfcheck, stopwatch, sweep, tables
from jaxnorm.report.cases import Case
from jaxnorm.report.plan import Entry
from jaxnorm.report.process import Job, run

ROOT = Path(__file__).parents[1]
LIMIT = 120.0
CASE = Case((2, 6, 5, 8), -1, "float32", True, "tanh", 3.0, False, DEVICES["H100"], implementation="xla", seed=5)


@pytest.fixture(autouse=True)
def _other_processes_find_the_faults(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))


def row_of(fault, limit=LIMIT, **arguments):
    """The row that a fault gets, the exit status, and the tables."""
    entry = Entry("numbers", {"case": fault, "way": "none", "ways": []}, Job(f"faults:{fault}", arguments, limit))
    report = selfcheck.run([entry], seconds=60)
    report |= {"seed": 0, "quick": True, "selfcheck": 2, "machine": {"gpu": None, "device": "cpu"}}
    status = selfcheck.publish(report, None, None)
    (row,) = report["numbers"]
    return row, status, tables.markdown(report, [report["verdict"]])


@pytest.mark.parametrize(
    ("fault", "outcome", "reason"),
    [
        ("dies", "died", "SIGABRT: CUDA_ERROR_LAUNCH_FAILED [from C++]"),
        ("leaves", "died", "exit status 3: it said nothing"),
        ("refuses", "failed", "RuntimeError: cannot launch <object>"),
    ],
)
def test_a_case_that_ends_badly_is_a_row_with_the_reason(fault, outcome, reason):
    row, status, text = row_of(fault)
    assert (row["outcome"], row["reason"]) == (outcome, reason)
    assert status == 1
    assert text.startswith(f"1 {outcome}\n")
    assert f"{outcome.upper()}: {reason}" in text


def test_a_case_that_hangs_is_killed():
    row, status, text = row_of("hangs", limit=3)
    assert (row["outcome"], row["reason"]) == ("hung", "not over after 3 s, then killed")
    assert status == 1
    assert "HUNG" in text


def test_the_rest_is_run_all_the_same():
    row = {"case": "", "way": "", "ways": []}
    faults = ("dies", "leaves", "refuses")
    entries = [Entry("numbers", row, Job(f"faults:{fault}", {}, LIMIT)) for fault in faults]
    report = selfcheck.run(
        [*entries, Entry("numbers", row, Job("json:loads", {"s": '{"outcome": "right"}'}, LIMIT))], 60
    )
    assert [found["outcome"] for found in report["numbers"]] == ["died", "died", "failed", "right"]
    assert proof.verdict(report) == "2 died, 1 failed"


def test_what_there_is_no_time_for_is_not_run_and_not_right():
    entry = Entry(
        "numbers", {"case": "", "way": "", "ways": []}, Job("json:loads", {"s": '{"outcome": "right"}'}, LIMIT)
    )
    report = selfcheck.run([entry], seconds=-1)
    assert report["numbers"][0]["outcome"] == "not run"
    assert proof.verdict(report) == "1 not run"
    assert selfcheck.run([entry], seconds=-1, must_run=("numbers",))["numbers"][0]["outcome"] == "right"
    assert proof.verdict({"numbers": [], "races": []}) == "nothing was run"


@pytest.mark.slow
@pytest.mark.parametrize("activation", cases.ACTIVATIONS)
def test_right_numbers_are_right(activation):
    case = dataclasses.replace(CASE, activation=activation, residual=activation != "tanh")
    row, status, _ = row_of("right", case=dataclasses.asdict(case))
    assert (row["outcome"], status) == ("right", 0)
    assert set(row["results"]) == {"y", "dx", "dgamma", "dbeta", *["dresidual"] * case.residual}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "wrong"),
    [
        ("scaled", {"y"}),
        ("not_a_number", {"y"}),
        ("wrong_gradient", {"dx", "dgamma", "dbeta", "dresidual"}),
    ],
)
def test_wrong_numbers_are_wrong(fault, wrong):
    row, status, text = row_of(fault, case=dataclasses.asdict(CASE))
    assert (row["outcome"], status) == ("wrong", 1)
    too_large = {name for name, found in row["results"].items() if not float(found["error"]) <= found["tolerance"]}
    assert too_large >= wrong
    assert ("y" in too_large) == ("y" in wrong)
    assert "WRONG" in text
    assert ("nan" in text) == (fault == "not_a_number")


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "outcome", "differing"), [("steady", "right", 0), ("racy", "race", 1)])
def test_a_race_is_seen(fault, outcome, differing):
    row, status, _ = row_of(fault, case=dataclasses.asdict(CASE), repeats=70)
    assert row["outcome"] == outcome, row
    assert row["differing"] == {"nothing": differing}
    assert row["runs"] == 70
    assert status == (outcome != "right")


def test_repeats_are_compared_bit_by_bit():
    """A NaN is as good as the same NaN, and -0.0 is not 0.0; the first two are not compared with anything."""
    signs = jnp.array([1, 1, 1, -1, -1, 1, 1], jnp.float32)

    def count(flip):
        runs = iter(range(7))

        def seen(_):
            return np.float32(signs[next(runs)] if flip else 1)

        def step(x):
            sign = jax.pure_callback(seen, jax.ShapeDtypeStruct((), jnp.float32), x[0])
            return {"zero": 0 * x[0] * sign, "nan": x * jnp.nan}

        stacked = jnp.arange(1, 7, dtype=jnp.float32).reshape(2, 3)
        return int(jax.jit(lambda stacked: races.repeat(step, stacked, 7))(stacked)[1])

    assert count(flip=False) == 0
    assert count(flip=True) == 2


# What is run.


@pytest.mark.parametrize("name", ["H100", "A100", "RTX 5090"])
def test_a_plan_has_every_way_and_every_option(name):
    device, seed = DEVICES[name], 0
    entries = plan.on_gpu(seed, False, device)
    assert entries == plan.on_gpu(seed, False, device) != plan.on_gpu(seed + 1, False, device)
    assert json.dumps([(entry.row, entry.job.arguments) for entry in entries])
    for stage in ("numbers", "races"):
        rows = [entry for entry in entries if entry.stage == stage and "case" in entry.job.arguments]
        seen = {tuple(way) for entry in rows for way in entry.row["ways"]}
        assert seen == {(way.copies, way.synchronization) for way in cases.ways(device)}
    drawn = [Case.of(json.loads(json.dumps(e.job.arguments["case"]))) for e in entries if e.stage == "numbers"]
    by_kernel = [case for case in drawn if case.implementation == "pallas"]
    assert {case.implementation for case in drawn} == {"pallas", "xla"}
    parts = {tile.blocks_per_instance for case in by_kernel for tile in case.tiles if tile.synchronization == "cluster"}
    assert parts == ({2, 4, 8} if device.compute_capability >= (9, 0) else set())
    for way in {(way.copies, way.synchronization) for way in cases.ways(device)}:
        of_way = [case for case in by_kernel if {(t.copies, t.synchronization) for t in case.tiles} == {way}]
        assert {case.dtype for case in of_way} == set(cases.DTYPES)
        assert {case.activation for case in of_way} == set(cases.ACTIVATIONS)
        assert {case.residual for case in of_way} == {False, True}
        assert {case.x64 for case in of_way} == {False, True}
        assert any(tile.ragged for case in of_way for tile in case.tiles)
    # Stores that the interpreter clips and a GPU does not: see ENDS.
    assert ((4, 64, 34, 34), "float32") in {(case.shape, case.dtype) for case in by_kernel}
    narrow = [tile for case in by_kernel for tile in case.tiles if tile.row_bytes == 16 and tile.copies != "span"]
    assert sum(tile.ragged and tile.shape[0] > 1 for tile in narrow) >= 8
    # What was drawn fits the GPU: that of a smaller one.
    for tile in (tile for case in by_kernel for tile in case.tiles):
        assert tile.shared_memory <= device.shared_memory
        assert tile.synchronization != "group" or tile.blocks_per_instance <= device.sm_count


def test_ways_are_all_that_tiling_has():
    """A way that is new to tiling must be checked too."""
    rng = np.random.default_rng(0)
    for device in (DEVICES["H100"], DEVICES["A100"]):
        known = {(way.copies, way.synchronization) for way in cases.ways(device)}
        for way in cases.ways(device) * 200:
            options = {"dtype": str(rng.choice(cases.DTYPES)), "activation": "none", "residual": False, "x64": False}
            case = cases._any(rng, way, bool(rng.integers(2)), options, device, cases.Size((2**8, 2**24), (1, 10**9)))
            assert {(t.copies, t.synchronization) for t in case.tiles if isinstance(t, Tile)} <= known


def test_quick_is_less():
    quick, whole = (plan.on_gpu(1, quick, DEVICES["H100"]) for quick in (True, False))
    assert {entry.stage for entry in quick} == {"numbers", "races", "times"}
    assert {entry.stage for entry in whole} == {"numbers", "races", "times", "sweep"}
    assert len(quick) < len(whole) / 3


def test_the_sweep_has_the_chosen_tile_of_each_pass_once():
    view = (8, 4096, 256)
    found = sweep.tiles(view, 4, DEVICES["H100"])
    assert [name for name, _, is_chosen in found if is_chosen] == ["forward", "backward"]
    assert len({(name, tile) for name, tile, _ in found}) == len(found) > 8
    assert all(tile.shared_memory <= DEVICES["H100"].shared_memory for _, tile, _ in found)
    assert sweep.tiles(view, 4, DEVICES["A100"])[0][2]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_without_a_gpu(tmp_path, capsys, monkeypatch):
    """The kernel is interpreted, and what was not done is said."""
    monkeypatch.setattr(plan, "without_gpu", lambda seed, planned=plan.without_gpu: planned(seed)[:2])
    monkeypatch.setattr(selfcheck, "_WITHOUT_GPU", 300)
    table, figures = tmp_path / "table.md", tmp_path / "figures.json"
    assert main(["selfcheck", "--seed", "3", "--json", str(figures), "--markdown", str(table)]) == 0
    printed = capsys.readouterr().out
    assert "No CUDA GPU" in printed
    assert "seed: 3" in printed
    report = json.loads(figures.read_text())
    assert [row["outcome"] for row in report["numbers"]] == ["right", "right"]
    assert report["verdict"] == proof.ALL_RIGHT
    assert report["machine"]["gpu"] is None
    assert not proof.ways_proven(report)
    assert table.read_text().count("| right") == 2


# What is proven.

REPORT = {
    "selfcheck": 2,
    "quick": False,
    "seed": 0,
    "seconds": 1,
    "machine": {"gpu": {"compute_capability": [9, 0], "sm_count": 132, "shared_memory": 227 * 1024}},
    "numbers": [
        {"case": "", "way": "", "ways": [["bulk", "cluster"]] * 2, "outcome": "right"},
        {"case": "", "way": "", "ways": [["bulk", "alone"]] * 2, "outcome": "right"},
        {"case": "", "way": "", "ways": [["bulk", "group"], ["bulk", "alone"]], "outcome": "right"},
        {"case": "", "way": "", "ways": [], "outcome": "right"},
    ],
    "races": [{"case": "", "way": "", "ways": [["bulk", "cluster"], ["bulk", "cluster"]], "outcome": "right"}],
}


def test_a_way_is_proven_by_numbers_and_races_of_both_passes():
    assert proof.ways_proven(REPORT) == {KernelKind((9, 0), "bulk", "cluster")}


@pytest.mark.parametrize(
    "change",
    [
        lambda report: report["numbers"][1].update(outcome="wrong"),
        lambda report: report["races"][0].update(outcome="race"),
        lambda report: report["races"][0].update(outcome="not run"),
        lambda report: report.update(races=[]),
        lambda report: report.update(quick=True),
        lambda report: report.update(selfcheck=1),
        lambda report: report["machine"].update(gpu=None),
    ],
)
def test_nothing_else_is_proven(change):
    report = copy.deepcopy(REPORT)
    change(report)
    assert not proof.ways_proven(report)


def test_every_entry_of_the_table_has_its_report():
    for way, name in devices.PROVEN.items():
        report = json.loads((ROOT / "benchmarks" / "results" / name).read_text())
        assert way in proof.ways_proven(report), (way, name)


# How time is taken, as far as a CPU shows it.


def test_every_buffer_is_read_once_and_no_call_is_dropped_or_moved():
    buffers = stopwatch.make_buffers((4, 8), "float32", 5 * 4 * 8 * 4 - 1)
    assert len(buffers) == 5
    assert len({float(buffer[0, 0]) for buffer in buffers}) == 5
    text = stopwatch.over(jnp.tanh).lower(buffers).compile().as_text()
    assert " while(" not in text
    assert len([line for line in text.splitlines() if " tanh(" in line]) == 5
    entry = text[text.index("ENTRY") :]
    assert entry.count(" parameter(") == 5
    for got, buffer in zip(stopwatch.over(jnp.tanh)(buffers), buffers, strict=True):
        np.testing.assert_array_equal(got, jnp.tanh(buffer))


def test_buffers_exceed_every_cache():
    for shape, _ in cases.NETWORKS.values():
        for dtype in ("float32", "bfloat16"):
            size = int(np.prod(shape)) * jnp.dtype(dtype).itemsize
            assert min(stopwatch._MOST_BUFFERS, stopwatch.BUFFER_BYTES // size + 1) * size > stopwatch.BUFFER_BYTES


def test_the_loop_of_the_races_computes_inside():
    stacked = jnp.ones((2, 8))
    text = jax.jit(lambda stacked, n: races.repeat(jnp.tanh, stacked, n)).lower(stacked, 3).compile().as_text()
    assert " while(" in text
    (computed,) = [line for line in text.splitlines() if " tanh(" in line]
    entry = text[text.index("ENTRY") :]
    assert computed not in entry.splitlines()


def test_rows_of_times():
    """By the host's clock here: a row per pass and contender, and a copy."""
    rows = stopwatch.compare([("tiny", (1, 4, 4, 8), -1, "float32")], buffer_bytes=1024)
    contenders = ["jaxnorm, xla", "flax"]
    wanted = [("forward", "copy"), *((p, c) for p in ("forward", "step") for c in contenders)]
    assert [(row["pass"], row["contender"]) for row in rows] == wanted
    for row in rows:
        size = 4 * 4 * 8 * 4
        assert row["bytes per second"] == pytest.approx({"forward": 2, "step": 5}[row["pass"]] * size / row["seconds"])
        assert row["low"] <= row["seconds"] <= row["high"]
        assert row["share of copy"] > 0
        assert row["clock"] == "host"
    assert rows[0]["share of copy"] == pytest.approx(1)


def test_the_backward_kernel_is_taken_out_of_the_step(monkeypatch):
    """As the profiler of a GPU would name the kernels: two buffers, 1 second forward and 2 backward."""
    kernels = [("jaxnorm_forward_mosaic_gpu_kernel", 1.0), ("fusion", 0.5), ("jaxnorm_backward_mosaic_gpu_kernel", 2.0)]
    taken = stopwatch.Taken(7.0, 2 * kernels)
    monkeypatch.setattr(stopwatch, "_clock", lambda: lambda step, buffers: taken)
    monkeypatch.setattr(stopwatch, "contenders", lambda *given: {"jaxnorm, kernel": jnp.negative})
    rows = stopwatch.compare([("tiny", (1, 4, 4, 8), -1, "float32")], buffer_bytes=1)
    assert [(row["pass"], row["seconds"]) for row in rows if row["contender"] == "jaxnorm, kernel"] == [
        ("forward", 3.5),
        ("step", 3.5),
        ("backward", 2.0),
    ]
    assert {row["clock"] for row in rows} == {"device"}


def test_jobs_find_the_package_of_the_checkout():
    assert run(Job("jaxnorm.report.machine:describe", {}, LIMIT)).result["gpu"] is None
