"""Compare the speed of the workshop's training loops with the speed of Quartet's loops on the CPU.

    python -m benchmarks.speed.training                             # all four networks, about four minutes
    python -m benchmarks.speed.training --only rnn --seconds 1      # one network, short

The loops are in ``benchmarks/speed/training_loops.py``. The workshop's loops read a whole window of a text or series to
predict one value, and the windows overlap. Quartet's loops read each character or value once, and predict the next
value after each of them. Therefore the program also prints, below the table, the number of values that each loop reads
per second.
The table calls Quartet's loops "ours". This benchmark only measures speed. The model cards state how well the networks
learn.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection

import torch

from benchmarks.speed.training_loops import PAIRS, Loop
from benchmarks.support.hardware import hardware
from training.run import configure_cpu


@dataclass(frozen=True)
class Speed:
    """Samples per second: the median, minimum and maximum over all rounds."""

    median: float
    minimum: float
    maximum: float


@dataclass(frozen=True)
class Result:
    """The speeds of both loops of a network.

    ``ratio`` compares the samples per second: it is the median of Quartet's loop divided by the median of the
    workshop's loop. ``read_ratio`` compares the values read per second in the same way.
    """

    samples: str
    workshop: Speed
    ours: Speed
    ratio: float
    read_ratio: float


def speed(loop: Loop, seconds: float) -> float:
    """Return the samples per second, measured over complete steps for at least ``seconds``."""
    samples, started = 0, time.perf_counter()
    while True:
        samples += next(loop)
        elapsed = time.perf_counter() - started
        if elapsed >= seconds:
            return samples / elapsed


def serve_measurements(name: str, side: str, threads: int, pipe: Connection) -> None:
    """Receive durations in seconds from ``pipe``. For each duration, measure one loop and send its speed.

    This function runs in a separate process.
    """
    if side == "ours":
        configure_cpu(threads)
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)  # this makes the workshop's loops faster too
    loop = getattr(PAIRS[name], side).loop()
    next(loop)  # reads the data
    while seconds := pipe.recv():
        pipe.send(speed(loop, seconds))


def measure(name: str, seconds: float, rounds: int, threads: int) -> Result:
    """Measure both loops of a network in turn, so that other programs on the machine disturb both loops alike."""
    pair, spawn = PAIRS[name], multiprocessing.get_context("spawn")
    pipes = []
    for side in ("workshop", "ours"):
        own_end, worker_end = spawn.Pipe()
        spawn.Process(target=serve_measurements, args=(name, side, threads, worker_end), daemon=True).start()
        worker_end.close()  # otherwise ``recv`` does not notice the end of the process
        pipes.append(own_end)

    def request_speed(pipe: Connection) -> float:
        pipe.send(seconds)
        rate: float = pipe.recv()
        return rate

    for pipe in pipes:
        request_speed(pipe)  # warm up
    rounds_of_speeds = [[request_speed(pipe) for pipe in pipes] for _ in range(rounds)]
    for pipe in pipes:
        pipe.send(0)
    workshop, ours = (
        Speed(statistics.median(side), min(side), max(side)) for side in zip(*rounds_of_speeds, strict=True)
    )
    ratio = ours.median / workshop.median
    return Result(pair.samples, workshop, ours, ratio, ratio * pair.ours.values_read / pair.workshop.values_read)


def rows(name: str, result: Result) -> str:
    """Return the two rows of a network in the table."""
    pair = PAIRS[name]
    sides = (("workshop", pair.workshop, result.workshop, ""), ("ours", pair.ours, result.ours, f"{result.ratio:.1f}"))
    return "\n".join(
        f"| {name} | {loop} | {speeds.median:,.0f} {result.samples} | {speeds.minimum:,.0f}–{speeds.maximum:,.0f} "
        f"| {ratio} | {side.limit} |"
        for loop, side, speeds, ratio in sides
    )


def remarks(results: dict[str, Result]) -> list[str]:
    """Return the values read per second as text: one line for each network whose samples have several values."""
    lines = []
    for name, result in results.items():
        pair = PAIRS[name]
        if pair.unit:
            workshop, ours = (
                result.workshop.median * pair.workshop.values_read,
                result.ours.median * pair.ours.values_read,
            )
            figures = f"{workshop:,.0f} and {ours:,.0f}, ratio {result.read_ratio:,.1f}"
            lines.append(f"{pair.unit.capitalize()} read per second, {name}: {figures}.")
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Measure the speed of the workshop's training loops and of Quartet's loops, in alternation."
    )
    parser.add_argument("--seconds", type=float, default=4, help="seconds of each measurement (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each loop (default: %(default)s)")
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count() or 1, help="threads of PyTorch (default: all cores)"
    )
    parser.add_argument("--only", choices=list(PAIRS), help="one network (default: all)")
    options = parser.parse_args(argv)
    results = {}
    print("| network | loop | per second | min–max | ratio | limited by |\n|---|---|--:|--:|--:|---|", flush=True)
    for name in [options.only] if options.only else list(PAIRS):
        results[name] = measure(name, options.seconds, options.rounds, options.threads)
        print(rows(name, results[name]), flush=True)
    conditions = {
        "hardware": hardware(),
        "threads": options.threads,
        "torch": torch.__version__,
        "seconds": options.seconds,
        "rounds": options.rounds,
    }
    print("", *remarks(results), sep="\n")
    print(json.dumps({**conditions, "networks": {name: asdict(result) for name, result in results.items()}}))


if __name__ == "__main__":
    main()
