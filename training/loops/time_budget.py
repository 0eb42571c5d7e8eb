"""``--minutes N``: choose the number of epochs by the measured time of a step."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable

from training.loops import distributed
from training.run import Run

MIN_TIMED_STEPS, MAX_TIMED_STEPS = 3, 12
ENOUGH_SECONDS = 3.0  # seconds after which timing stops, but not before MIN_TIMED_STEPS
STEPS_SHARE = 0.88  # share of the minutes for steps; the rest is for validation and checkpoints


def epochs_within_budget(
    run: Run, per_epoch: int, default: int, make_step: Callable[[], Callable[[int], object]]
) -> int:
    """The epochs, at least 1, that fit into the run's minutes; ``default`` without ``--minutes``.

    A resumed run keeps its number of epochs.

    Args:
        run: the run; the result is stored in its folder as budget.json.
        per_epoch: steps per epoch.
        default: epochs without ``--minutes``.
        make_step: returns a function that takes the number of a step and trains a copy of the network.
    """
    minutes = run.options.minutes
    if minutes is None:
        return default
    path = run.folder / "budget.json"
    if not distributed.from_rank_zero(path.exists):
        seconds = max(1e-5, round(_seconds_per_step(make_step()), 5))
        epochs = max(1, int(minutes * 60 * STEPS_SHARE / (per_epoch * seconds)))
        budget = {"minutes": minutes, "seconds_of_a_step": seconds, "steps_of_an_epoch": per_epoch, "epochs": epochs}
        distributed.from_rank_zero(lambda: _save(run, budget))
    stored: int = distributed.from_rank_zero(lambda: json.loads(path.read_text())["epochs"])
    return stored


def _save(run: Run, budget: dict[str, float]) -> None:
    (run.folder / "budget.tmp").write_text(json.dumps(budget) + "\n")
    os.replace(run.folder / "budget.tmp", run.folder / "budget.json")
    steps, seconds = budget["steps_of_an_epoch"], budget["seconds_of_a_step"]
    if seconds * steps > budget["minutes"] * 60:
        print(
            f"one epoch takes about {seconds * steps / 60:.1f} minutes, longer than --minutes: training for one epoch"
        )
    else:
        print(f"a step takes {seconds:.3g} s: training for {budget['epochs']:,} epochs of {steps:,} steps")


def _seconds_per_step(step: Callable[[int], object]) -> float:
    """The median seconds of a step in the first process, after one warm-up step."""
    step(0)
    durations: list[float] = []

    def unfinished() -> bool:
        return len(durations) < MIN_TIMED_STEPS or (
            sum(durations) < ENOUGH_SECONDS and len(durations) < MAX_TIMED_STEPS
        )

    while distributed.from_rank_zero(unfinished):
        start = time.perf_counter()
        step(len(durations) + 1)
        durations.append(time.perf_counter() - start)
    return distributed.from_rank_zero(lambda: statistics.median(durations))
