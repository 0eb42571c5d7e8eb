"""How long a training may take: ``--minutes N`` fits the epochs to the machine, whatever else it has to do."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable

from training.loops import distributed
from training.run import Run

MIN_TIMED_STEPS, MAX_TIMED_STEPS = 3, 12  # that are timed ...
ENOUGH_SECONDS = 3.0  # ... and seconds after which no more are
STEPS_SHARE = 0.88  # share of the time that steps may take; the rest is for validation and for saving


def epochs_within_budget(
    run: Run, per_epoch: int, default: int, make_step: Callable[[], Callable[[int], object]]
) -> int:
    """The epochs of ``per_epoch`` steps that fit into the run's minutes, at least 1; ``otherwise`` without a budget.

    ``begin`` gives the function that takes a step of a training that is thrown away. It is timed once: a run that is
    resumed keeps its epochs.
    """
    minutes = run.options.minutes
    if minutes is None:
        return default
    path = run.folder / "budget.json"
    if not distributed.from_rank_zero(path.exists):
        seconds = max(1e-5, round(_seconds_per_step(make_step()), 5))
        found = max(1, int(minutes * 60 * STEPS_SHARE / (per_epoch * seconds)))
        told = {"minutes": minutes, "seconds_of_a_step": seconds, "steps_of_an_epoch": per_epoch}
        distributed.from_rank_zero(lambda: _save(run, {**told, "epochs": found}))
    kept: int = distributed.from_rank_zero(lambda: json.loads(path.read_text())["epochs"])
    return kept


def _save(run: Run, told: dict[str, float]) -> None:
    (run.folder / "budget.tmp").write_text(json.dumps(told) + "\n")
    os.replace(run.folder / "budget.tmp", run.folder / "budget.json")
    step, count, whole = (
        told["seconds_of_a_step"],
        told["epochs"],
        told["seconds_of_a_step"] * told["steps_of_an_epoch"],
    )
    if whole > told["minutes"] * 60:
        print(f"one epoch alone takes about {whole / 60:.1f} minutes: it is trained for one")
    else:
        print(f"a step takes {step:.3g} s: {count:,} epochs of {told['steps_of_an_epoch']:,} steps fit")


def _seconds_per_step(step: Callable[[int], object]) -> float:
    """The median time of a step, after one to warm up; that of the first process, in all of them."""
    step(0)
    taken: list[float] = []
    while distributed.from_rank_zero(
        lambda: len(taken) < MIN_TIMED_STEPS or (sum(taken) < ENOUGH_SECONDS and len(taken) < MAX_TIMED_STEPS)
    ):
        begun = time.perf_counter()
        step(len(taken) + 1)
        taken.append(time.perf_counter() - begun)
    return distributed.from_rank_zero(lambda: statistics.median(taken))
