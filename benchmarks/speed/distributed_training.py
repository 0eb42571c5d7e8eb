"""Measure training with several processes (DistributedDataParallel) on the CPU.

    python -m benchmarks.speed.distributed_training            # all networks and layouts, about four minutes
    python -m benchmarks.speed.distributed_training --only cnn --seconds 1 --rounds 1

The benchmark measures training steps with the presets for the data of users. The batch size is the same for any number
of processes. With two processes, each takes half of the batch, and the processes average their gradients with gloo. The
images, characters and series are random. The benchmark does not read data, validate, or save checkpoints.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch

from app.networks.cnn import WhitenedNet, WhitenedNetSizes
from app.networks.forecaster import Forecaster
from app.networks.series_reader import ForecasterSizes
from benchmarks.speed.training import Speed
from benchmarks.support.hardware import hardware
from training.configs import CNN_OWN, LSTM_OWN, RNN_OWN
from training.data.series.windows import Source, WindowSampler
from training.loops import cnn_finetune, distributed, forecaster
from training.loops.text import language_model
from training.run import configure_cpu

LAYOUTS = ((1, 1), (1, 2), (2, 1))  # (processes, threads of each)
CALIBRATION_STEPS = 3  # the time of these steps, after the first, determines the number of measured steps
VOCABULARY = 64  # number of different characters

Step = Callable[[int], object]


@dataclass(frozen=True)
class Workload:
    """A training workload. ``start`` returns a function that trains for one step on ``batch`` samples."""

    samples: str
    batch: int
    start: Callable[[], Step]


def images() -> Step:
    """Return a function that trains the CNN for one step.

    The images are colour images of 32 x 32 pixels in ten classes. The training starts from random weights.
    """
    config = CNN_OWN
    network = WhitenedNet(WhitenedNetSizes(10, widths=(config.first_width, config.later_width, config.later_width)))
    trainer = cnn_finetune.FinetuneTrainer(config, network, "cpu", pretrained=False)
    pixels, labels = torch.randint(256, (config.batch, 3, 32, 32), dtype=torch.uint8), torch.arange(config.batch) % 10
    return lambda step: trainer.update(pixels, labels, torch.arange(config.batch), step, 10**6)


def characters() -> Step:
    """Return a function that trains the text network (a stack of Elman layers) for one step."""
    config = RNN_OWN
    trainer = language_model.Trainer(language_model.new_network(config, VOCABULARY), config)
    characters = torch.randint(VOCABULARY, (config.batch, config.bptt + 1))
    state = trainer.network.zero_state(config.batch // distributed.world_size())
    return lambda step: trainer.update(characters, state, config.learning_rate)


def series() -> Step:
    """Return a function that trains the forecaster for one step, on series with a season of 12 values.

    The forecaster is an ensemble, and all its members are trained.
    """
    sizes = ForecasterSizes()
    values = list(torch.randn(20, 400, dtype=torch.float64))
    sampler = WindowSampler([Source(values, 12, 12, 1.0)], sizes.context, sizes.horizon)
    trainer = forecaster.Trainer(Forecaster(sizes), sampler, LSTM_OWN, 0, "cpu")
    return lambda step: trainer.update(step, LSTM_OWN.learning_rate)


WORKLOADS = {
    "cnn": Workload("images", CNN_OWN.batch, images),
    "rnn": Workload("characters", RNN_OWN.batch * RNN_OWN.bptt, characters),
    "lstm": Workload("windows", LSTM_OWN.batch * ForecasterSizes().members, series),
}


def run_measurement(name: str, seconds: float, threads: int) -> None:
    """Train for about ``seconds`` in each process. The first process prints the samples per second."""
    configure_cpu(threads)
    distributed.initialize("cpu")
    torch.manual_seed(0)
    step = WORKLOADS[name].start()
    step(0)
    started = time.perf_counter()
    for number in range(CALIBRATION_STEPS):
        step(number + 1)
    step_seconds = (time.perf_counter() - started) / CALIBRATION_STEPS
    count = distributed.from_rank_zero(lambda: math.ceil(seconds / step_seconds))  # equal in all processes
    started = time.perf_counter()
    for number in range(count):
        step(number + 1 + CALIBRATION_STEPS)
    distributed.print_once(str(count * WORKLOADS[name].batch / (time.perf_counter() - started)))
    distributed.exit_process()


def speed(name: str, seconds: float, count: int, threads: int) -> float:
    """Return the samples per second of one measurement in ``count`` new processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)] if count > 1 else []
    arguments = ["-m", "benchmarks.speed.distributed_training", "--measurement", name]
    arguments += ["--seconds", str(seconds), "--threads", str(threads)]
    result = subprocess.run([sys.executable, *launcher, *arguments], capture_output=True, text=True, check=False)
    if result.returncode:
        sys.exit(result.stderr[-2000:])
    return float(result.stdout.split()[-1])


def measure(name: str, seconds: float, rounds: int) -> list[Speed]:
    """Measure all layouts in turn, so that other programs on the machine disturb all layouts alike."""
    rounds_of_speeds = [[speed(name, seconds, *layout) for layout in LAYOUTS] for _ in range(rounds)]
    return [
        Speed(statistics.median(speeds), min(speeds), max(speeds)) for speeds in zip(*rounds_of_speeds, strict=True)
    ]


def row(name: str, result: Sequence[Speed]) -> str:
    """Return a row of the table. The row compares two processes with one process that has one thread or two threads."""
    one, threads, two = result
    cells = [f"{speeds.median:,.0f} ({speeds.minimum:,.0f}–{speeds.maximum:,.0f})" for speeds in result]
    ratios = [f"{two.median / base.median:.2f}" for base in (one, threads)]
    workload = WORKLOADS[name]
    return f"| {name} | {workload.samples}, {workload.batch:,} per step | {' | '.join([*cells, *ratios])} |"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Measure the speed of training in one process and in two, in alternation."
    )
    parser.add_argument("--seconds", type=float, default=4, help="seconds of each measurement (default: %(default)s)")
    parser.add_argument(
        "--rounds", type=int, default=3, help="measurements of each number of processes (default: %(default)s)"
    )
    parser.add_argument("--only", choices=list(WORKLOADS), help="one network (default: all)")
    # This program passes these two options to the processes that it starts.
    parser.add_argument("--measurement", choices=list(WORKLOADS), help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.measurement:
        run_measurement(options.measurement, options.seconds, options.threads)
        return
    headers = [
        "1 process, 1 thread",
        "1 process, 2 threads",
        "2 processes, 1 thread each",
        "ratio to 1 thread",
        "ratio to 2 threads",
    ]
    print(f"| network | per second | {' | '.join(headers)} |\n|---|---|--:|--:|--:|--:|--:|", flush=True)
    results = {}
    for name in [options.only] if options.only else list(WORKLOADS):
        results[name] = measure(name, options.seconds, options.rounds)
        print(row(name, results[name]), flush=True)
    conditions = {
        "hardware": hardware(),
        "torch": torch.__version__,
        "seconds": options.seconds,
        "rounds": options.rounds,
    }
    print(
        json.dumps(
            {
                **conditions,
                "networks": {
                    name: [asdict(layout_speed) for layout_speed in result] for name, result in results.items()
                },
            }
        )
    )


if __name__ == "__main__":
    main()
