"""Draws docs/phases.svg: what the thread blocks of one SM do over time, by the model of benchmarks/timeline.py.

    PYTHONPATH=benchmarks python docs/phases.py

The forward pass of (8, 64, 64, 256) float32 with a ReLU on an H100, as the kernel was and as it is; the numbers are
those that benchmarks/kernel_cost.py reads off the machine code of either.
"""

import pathlib

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import timeline
from timeline import CHIPS, Sweep, Work

BEFORE = Work(256, 4, 1, 131072, 131072, 4, Sweep(1430, 1430), Sweep(1426, 1426), Sweep(3984, 3984), 2633, 153)
AFTER = Work(512, 8, 3, 65536, 65536, 4, Sweep(1178, 660), Sweep(), Sweep(1490, 1033), 2013, 25)
NAMES = {
    timeline.STARTING: ("start", "#d0d0d0"),
    timeline.LOADING: ("load, sum the boxes that came", "#4c78a8"),
    timeline.COMPUTING: ("sum again", "#f58518"),
    timeline.MEETING: ("sum across warps, meet", "#b279a2"),
    timeline.STORING: ("normalize, store", "#54a24b"),
    timeline.ENDING: ("next", "#d0d0d0"),
}


def draw(work: Work, title: str, blocks_axis: plt.Axes, memory_axis: plt.Axes) -> float:
    """One SM's blocks above, the memory of the whole chip below. Returns the microseconds."""
    chip = CHIPS["H100"]
    run = timeline.Timeline(work, chip)
    phases, moved = [], []
    for at, bytes_moved in run.steps():
        phases.append(run.phase.copy())
        moved.append((at, bytes_moved / timeline.STEP / chip.bandwidth))
    history = np.array(phases)
    lanes: list[float] = []
    for block in np.flatnonzero(run.sm == 0):
        here = np.flatnonzero((history[:, block] > timeline.WAITING) & (history[:, block] < timeline.DONE))
        start = here[0]
        lane = next((i for i, busy_until in enumerate(lanes) if busy_until <= start), len(lanes))
        lanes[lane : lane + 1] = [here[-1]]
        for phase, (_, color) in NAMES.items():
            steps = np.flatnonzero(history[:, block] == phase)
            if steps.size:
                left, width = steps[0] * timeline.STEP, steps.size * timeline.STEP
                blocks_axis.barh(lane, width, left=left, height=0.8, color=color, edgecolor="white", linewidth=0.5)
    blocks_axis.set(title=title, yticks=range(len(lanes)), yticklabels=[f"slot {i}" for i in range(len(lanes))])
    blocks_axis.invert_yaxis()
    # Corners only: most steps are like the one before and the one after.
    corners = [
        p for before, p, after in zip(moved, moved[1:], moved[2:], strict=False) if {before[1], after[1]} != {p[1]}
    ]
    times, shares = np.array([moved[0], *corners, moved[-1]]).T
    memory_axis.fill_between(times, np.minimum(shares, 1), color="#9c755f", linewidth=0)
    memory_axis.set(ylim=(0, 1.05), yticks=[0, 1], yticklabels=["0", "full"], ylabel="memory")
    return float(times[-1])


def main() -> None:
    # Text stays text, and a new run of the same picture is the same file.
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "phases", "font.size": 9})
    figure, axes = plt.subplots(4, 1, figsize=(8, 6), sharex=True, height_ratios=[1, 1, 2, 1], layout="constrained")
    times = [
        draw(BEFORE, "before: one thread block per SM, three sweeps", *axes[:2]),
        draw(AFTER, "now: three thread blocks per SM, two sweeps and a quarter", *axes[2:]),
    ]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set(xlabel="microseconds (modelled)", xlim=(0, max(times)))
    handles = [plt.Rectangle((0, 0), 1, 1, color=color) for _, color in list(NAMES.values())[:-1]]
    figure.legend(handles, [name for name, _ in list(NAMES.values())[:-1]], loc="outside lower center", ncols=3)
    figure.savefig(pathlib.Path(__file__).with_name("phases.svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
