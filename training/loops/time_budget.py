"""The option ``--minutes N``: plan how many steps fit into N minutes, and adapt the plan during training."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

from training.loops import distributed
from training.run import Run

MIN_TIMED_STEPS, MAX_TIMED_STEPS = 2, 12
ENOUGH_SECONDS = 2.0  # timing stops after this time, but not before MIN_TIMED_STEPS
REPLAN_SHARE = 0.02  # share of the steps between two plans
FREEZE_SHARE = 0.97  # share of the steps after which the plan no longer changes, so that the learning rate ends at 0
MAX_CHANGE = 2.0  # largest factor by which one plan changes the number of remaining steps


class StepBudget:
    """A function that returns the number of steps of a run. With ``--minutes``, the number changes during training.

    The plan is stored in budget.json, so that a resumed run continues with the same plan.

    Args:
        run: the run.
        steps: the fixed number of steps, or the number that is planned first.
        seconds: time limit of the whole command, or None for a fixed number of steps.
        finish_seconds: expected time of the evaluation after training.
        trainings: 2 if a second training with up to the same number of steps follows, otherwise 1.
    """

    def __init__(
        self, run: Run, steps: int, seconds: float | None = None, finish_seconds: float = 0.0, trainings: int = 1
    ) -> None:
        self.run, self.steps, self.seconds, self.finish_seconds = run, steps, seconds, finish_seconds
        self.trainings = trainings
        self.clock: tuple[float, int] | None = None  # time and step from which the pace is measured
        self.next_plan = self.first_step = -1
        self.end = 0.0  # time of the monotonic clock at which training ends

    def __call__(self) -> int:
        """Return the number of steps. With a time limit, the number is planned again from time to time."""
        step = self.run.step
        if self.seconds is None:
            return self.steps
        if self.first_step < 0:  # at the first call, set the end; a resumed run has used a part of its time
            self.first_step = step
            begun = self.run.options.started + self.seconds - self.finish_seconds
            self.end = begun if step == 0 else time.monotonic() + self.seconds - self.finish_seconds - self.run.seconds
        elif step == self.first_step + 1 and self.clock is None:  # after the first step, because it is slow
            self.clock, self.next_plan = (time.monotonic(), step), step + 1
        elif step >= self.next_plan > 0 and step < FREEZE_SHARE * self.steps:
            self.steps = distributed.from_rank_zero(lambda: self._planned(step))
            self.next_plan = step + max(1, round(REPLAN_SHARE * self.steps))
        return self.steps

    def _planned(self, step: int) -> int:
        assert self.clock is not None
        now = time.monotonic()
        pace = (now - self.clock[0]) / (step - self.clock[1])
        remaining = max(1, self.steps - step)
        fitting = ((self.end - now) / max(pace, 1e-6) - (self.trainings - 1) * step) / self.trainings
        steps = step + max(1, round(min(max(fitting, remaining / MAX_CHANGE), remaining * MAX_CHANGE)))
        _save(self.run, {"steps": steps, "finish_seconds": self.finish_seconds})
        return steps


def plan(
    run: Run,
    default: int,
    start_dummy_run: Callable[[], Callable[[int], object]],
    timed_evaluation: Callable[[], float] | None = None,
    refit: bool = False,
) -> StepBudget:
    """Return the step budget of a run: ``default`` steps, or the steps that fit into ``--minutes``, but at least one.

    Args:
        run: the run. Its folder stores the plan as budget.json.
        default: the number of steps without ``--minutes``.
        start_dummy_run: returns a function that takes the number of a step, and trains a copy of the network for one
            step.
        timed_evaluation: runs the final evaluation once on an untrained network, to measure its time. Returns the
            seconds of the parts that it skips; see ``Run.time_evaluation``.
        refit: whether half of the training time is kept for a second training on all data; see ``training.refit``.
    """
    minutes = run.options.minutes
    if minutes is None:
        return StepBudget(run, default)
    path = run.folder / "budget.json"
    if not distributed.from_rank_zero(path.exists):
        finish = distributed.from_rank_zero(lambda: run.time_evaluation(timed_evaluation) if timed_evaluation else 0.0)
        seconds = max(1e-5, _seconds_per_step(start_dummy_run()))
        trained_seconds = seconds * (1 + refit)
        distributed.from_rank_zero(lambda: _first_plan(run, 60 * minutes, trained_seconds, finish))
    stored: dict[str, Any] = distributed.from_rank_zero(lambda: json.loads(path.read_text()))
    return StepBudget(run, stored["steps"], 60 * minutes, stored["finish_seconds"], 1 + refit)


def _first_plan(run: Run, total_seconds: float, seconds: float, finish: float) -> None:
    """Store and print the number of steps that fit into the time.

    ``seconds`` is the time of one step in all trainings together. ``finish`` is the time of the evaluation.
    """
    left = total_seconds - finish - (time.monotonic() - run.options.started)
    steps = max(1, int(left / seconds))
    _save(run, {"steps": steps, "finish_seconds": finish})
    if left < seconds:
        print(f"start and evaluation take longer than --minutes {total_seconds / 60:g}, so training has only one step")
    else:
        print(f"a step takes {seconds:.3g} s, the evaluation {finish:.0f} s: training for about {steps:,} steps")


def _save(run: Run, budget: dict[str, float]) -> None:
    (run.folder / "budget.tmp").write_text(json.dumps(budget) + "\n")
    os.replace(run.folder / "budget.tmp", run.folder / "budget.json")


def _seconds_per_step(step: Callable[[int], object]) -> float:
    """Return the median seconds of a step in the first process, measured after one warm-up step."""
    step(0)
    taken: list[float] = []

    def unfinished() -> bool:
        return len(taken) < MIN_TIMED_STEPS or (sum(taken) < ENOUGH_SECONDS and len(taken) < MAX_TIMED_STEPS)

    while distributed.from_rank_zero(unfinished):
        start = time.perf_counter()
        step(len(taken) + 1)
        taken.append(time.perf_counter() - start)
    return distributed.from_rank_zero(lambda: statistics.median(taken))
