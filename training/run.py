"""Training runs, for all training commands: progress bar, checkpoints, learning curves and publishing.

All random numbers of a step depend only on the seed and the step. So a run that was killed and resumed ends with the
same weights as an uninterrupted run.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import io
import json
import math
import os
import platform
import shlex
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from app import store
from app.store.disk import Disk
from app.store.version import Version, encode_weights
from app.tasks import TASKS
from training.evaluation import drift, intervals, speed, test_measurements
from training.limits import limits
from training.options import Options, Part
from training.publishing import commit, publish_once, runnable

F = TypeVar("F", Path, io.StringIO)  # where a figure is saved

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # from glibc's malloc.h
INTERRUPTED = 130  # exit status after Ctrl-C, 128 + SIGINT
WARM_UP = 0.05  # share of the training steps during which the learning rate rises


@dataclass(frozen=True)
class Budget:
    """How long a training lasts: ``seconds``, or ``steps`` steps if ``seconds`` is None.

    A training of ``steps`` steps may be the beginning of a training of ``total`` steps. Its learning rates are then
    those of the longer training.
    """

    steps: int
    seconds: float | None = None
    total: int | None = None

    def done(self, steps: int, seconds: float) -> float:
        """Return the share of the training that is done after one more step.

        ``steps``: number of steps so far. ``seconds``: their duration. The next step takes as long as their mean.
        """
        if self.seconds is None:
            return (steps + 1) / (self.total or self.steps)
        return min(1.0, seconds * (steps + 1) / max(1, steps) / self.seconds)

    def is_over(self, steps: int, done: float) -> bool:
        """Return whether the training has ended after ``steps`` steps, which are the share ``done`` of it."""
        return steps >= self.steps if self.seconds is None else done >= 1


def cosine_schedule(done: float) -> float:
    """Return the factor of the learning rate, which rises linearly during ``WARM_UP``, and then falls as a cosine to 0.

    ``done``: the share of the training that ends with this step.
    """
    if done < WARM_UP:
        return done / WARM_UP
    return 0.5 * (1 + math.cos(math.pi * (done - WARM_UP) / (1 - WARM_UP)))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of all parameter groups: ``rate``, times ``initial`` if a group has this key."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("initial", 1.0)


def derive_seed(seed: int, *keys: object) -> int:
    """Return a seed that depends on the run's seed and on ``keys``, which identify what the seed is used for."""
    return int.from_bytes(hashlib.blake2b(repr((seed, *keys)).encode(), digest_size=7).digest())


def permutation(count: int, seed: int, *keys: object) -> torch.Tensor:
    """Return a random order [count] that depends only on the seed and the keys."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(derive_seed(seed, *keys)))


class Run:
    """One training run with its folder, progress bar and checkpoints.

    Attributes:
        resumed: the steps at which the run was resumed, each with the commits and versions of PyTorch, for the card.
        tracked: the objects with ``state_dict`` that a checkpoint holds.
        done: the share of the training that is done after the current step.
        refitting: whether the second training, on all data, has begun; see ``begin_refit``.
        lock: holds the lock of the folder until the run is finished or interrupted.
        code: the commit and the version of PyTorch.

    ``data`` is the digest of the user's data, or None for public data. A run can be resumed only with the same config
    and the same data, and measured only on the part of the data for which it was started.
    """

    def __init__(self, options: Options, config: Any, argv: Sequence[str] | None, data: str | None = None) -> None:
        self.options = options
        arguments = [word for word in (sys.argv[1:] if argv is None else argv) if word != "--resume"]
        self.command = shlex.join(["python", "-m", options.script, *arguments])
        self.commit = commit()
        self.code = f"commit {self.commit}, torch {torch.__version__}"
        self.tracked: dict[str, Any] = {}
        self.step, self.seconds = 0, 0.0
        self.done = self._done_before = 0.0
        self.resumed: list[str] = []
        self._code_before = ""  # the code that wrote the checkpoint, if one was loaded
        self.latest_metrics: dict[str, float] = {}
        self.refitting = False
        self.limits, self._steps_taken = limits(), 0
        configure_cpu(options.threads)
        torch.manual_seed(options.seed)
        own = {key: str(value) for key in options.own if (value := vars(options)[key]) is not None}
        content = {"seed": options.seed, "part": options.part, "minutes": options.minutes, "data": data}
        content = json.loads(json.dumps(content | config.model_dump() | own))
        self.lock = contextlib.ExitStack()
        self.folder = open_folder(options, content, self.lock)

    def begin_refit(self) -> None:
        """Begin the second training, on all data. It has its own steps, log and checkpoint.

        Call this method after the last step of the first training. If the run is resumed later, the first training has
        no steps left, and the second training continues.
        """
        self.refitting, self.step, self._code_before = True, 0, ""
        self.tracked, self.latest_metrics = {}, {}

    @property
    def _checkpoint(self) -> Path:
        return self.folder / ("refit.pt" if self.refitting else "state.pt")

    @property
    def _log(self) -> Path:
        return self.folder / ("refit.jsonl" if self.refitting else "metrics.jsonl")

    def track(self, **objects: Any) -> None:
        """Set the objects that a checkpoint holds, and load the last checkpoint if the run has one."""
        self.tracked = objects
        path = self._checkpoint
        if not path.exists():
            self._log.unlink(missing_ok=True)  # from a run that was killed before its first checkpoint
            return
        state = load_checkpoint(path, objects)
        self.step, self.seconds, self.resumed = state["step"], state["seconds"], state["resumed"]
        self._code_before = state["code"]
        if self._code_before != self.code:
            print(f"{path} was written with {self._code_before}; now {self.code}. The changes may affect the result")
        lines = [line for line in log_lines(self._log) if json.loads(line)["step"] <= self.step]
        self._log.write_text("".join(lines))
        print(f"{self.folder}: resumed at step {self.step}")

    def save(self) -> None:
        """Write a checkpoint. It replaces the previous checkpoint atomically."""
        tracked = {name: tracked.state_dict() for name, tracked in self.tracked.items()}
        progress = {"step": self.step, "seconds": self.seconds, "resumed": self.resumed, "code": self.code}
        save_checkpoint(self._checkpoint, {"tracked": tracked, **progress})

    def budget(self, steps: int, refit: bool = False) -> Budget:
        """Return the budget of a training: ``--minutes``, or ``steps`` steps.

        ``refit``: whether a second training follows, which gets half of the time; see ``Options.refits``.
        """
        minutes = self.options.minutes
        return Budget(steps, None if minutes is None else 60 * minutes / (1 + refit))

    def steps(self, budget: Budget) -> Iterator[int]:
        """Yield the number of each remaining step, and show a progress bar. Each step has its own random seed.

        Ctrl-C finishes the current step, writes a checkpoint and exits with the command that resumes the run.
        """
        interrupted = False

        def interrupt(*_: object) -> None:
            nonlocal interrupted
            interrupted = True

        self.done = budget.done(self.step - 1, self.seconds) if self.step else 0.0
        over = budget.is_over(self.step, self.done)
        self._record_resumption(over)
        handler = signal.signal(signal.SIGINT, interrupt)
        saved = last = time.monotonic()
        bar = self._progress_bar(budget)
        try:
            while not over:
                torch.manual_seed(derive_seed(self.options.seed, "step", self.step))
                self._done_before, self.done = self.done, budget.done(self.step, self.seconds)
                yield self.step
                self.step += 1
                now = time.monotonic()
                self.seconds, last = self.seconds + now - last, now
                over = budget.is_over(self.step, self.done)
                self._signal_for_tests()
                if interrupted or over or now - saved > self.limits.checkpoint_seconds:
                    self._check_weights()
                    self.save()
                    saved = now
                bar.set_postfix({key: f"{value:.4g}" for key, value in self.latest_metrics.items()}, refresh=False)
                bar.update(1 if budget.seconds is None else round(min(self.seconds, budget.seconds)) - bar.n)
                if interrupted:
                    bar.close()
                    self.lock.close()
                    command = f"{runnable(self.command)} --resume"
                    sys.exit(f"saved {self.folder} at step {self.step}; resume with: {command}")
        finally:
            bar.close()
            signal.signal(signal.SIGINT, handler)

    def _signal_for_tests(self) -> None:
        """Send the signal that ``limits`` names to this process, after the steps that it names."""
        self._steps_taken += 1
        if self.limits.signal and self._steps_taken == self.limits.signal_steps:
            if self.limits.signal == signal.SIGKILL:
                self.save()
            signal.raise_signal(self.limits.signal)

    def _record_resumption(self, over: bool) -> None:
        """Record for the card that the run was resumed, if it was. ``over``: whether no steps are left."""
        before = self._code_before
        if before and (not over or before != self.code):
            place = f"after the last step, {self.step}" if over else f"step {self.step}"
            training = " of the training on all data" if self.refitting else ""
            self.resumed.append(f"{place}{training}; before: {before}; after: {self.code}")

    def _progress_bar(self, budget: Budget) -> Any:
        """Return a progress bar over the steps or, with a time limit, over the seconds."""
        timed = budget.seconds is not None
        return tqdm(
            total=round(budget.seconds) if budget.seconds is not None else budget.steps,
            initial=round(self.seconds) if timed else self.step,
            desc=f"{self.options.name}, all data" if self.refitting else self.options.name,
            unit="s" if timed else "step",
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} s{postfix}" if timed else None,
            dynamic_ncols=True,
        )

    def is_due(self, times: int) -> bool:
        """Return whether something that happens ``times`` times, evenly spread over the training, is due at this step.

        It is always due at the last step.
        """
        return int(self.done * times + 1e-9) > int(self._done_before * times + 1e-9)

    def _check_weights(self) -> None:
        """Exit with a message if a tracked network has weights that are not finite."""
        for name, network in self.tracked.items():
            if isinstance(network, torch.nn.Module):
                bad = sum(int((~tensor.isfinite()).sum()) for tensor in network.state_dict().values())
                if bad:
                    message = f"at step {self.step}, {name} has {bad:,} weights that are NaN or infinite"
                    sys.exit(f"the training diverged: {message}; use a lower learning rate")

    def log(self, **metrics: float) -> None:
        """Show metrics on the progress bar and append them to the log with the current step.

        The log is metrics.jsonl, or refit.jsonl for the second training.
        """
        self.latest_metrics.update(metrics)
        with self._log.open("a") as file:
            file.write(json.dumps({"step": self.step + 1, **metrics}) + "\n")

    def write_lines(self, name: str, lines: Sequence[str]) -> None:
        """Write a text file to the run's folder."""
        text = "".join(f"{line}\n" for line in lines)
        (self.folder / name).write_text(text, "utf-8", "backslashreplace")  # file names may not be UTF-8

    def plot_curves(self) -> list[Path]:
        """Plot every metric of metrics.jsonl over the steps in curves.png; return its path, or [] without a log."""
        records = [json.loads(line) for line in log_lines(self.folder / "metrics.jsonl")]
        if not records:
            return []
        log = pd.DataFrame(records).set_index("step")
        figure = new_figure(4.2 * len(log.columns), 3.2)
        for name, axis in zip(log, figure.subplots(1, len(log.columns), squeeze=False)[0], strict=True):
            axis.plot(log[name].dropna(), linewidth=1.2)
            axis.set(title=str(name).replace("_", " "), xlabel="step")
            axis.grid(alpha=0.3)
        return [save_figure(figure, self.folder / "curves.png")]

    def provenance(self) -> dict[str, Any]:
        """Return the fields of the card that describe the run."""
        options = self.options
        threads = "" if options.device.startswith("cuda") else f", threads: {options.threads}"
        return {
            "seed": options.seed,
            "command": self.command,
            "commit": self.commit,
            "resumed": self.resumed or None,
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "hardware": speed.hardware(options.device) + threads,
            "minutes": round(self.seconds / 60, 1),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }

    def predictor(self, card: dict[str, Any], network: torch.nn.Module) -> Any:
        """Load the trained network with the serving code, so that measurements use the predictions of the service."""
        full_card = store.Card.model_validate(
            {"name": self.options.name, "version": 1, "metrics": {}, "weights_sha256": "", **card, **self.provenance()}
        )
        tensors = {key: tensor.detach().cpu() for key, tensor in network.state_dict().items()}
        version = Version(self.folder, full_card, tensors)
        return TASKS[full_card.task].load(version, torch.device(self.options.device))

    def measure(
        self,
        card: dict[str, Any],
        network: torch.nn.Module,
        evaluate: Callable[[Any, Part], dict[str, Any]],
        publish: bool = True,
        examples: Iterable[Iterable[Any]] = (),
    ) -> tuple[dict[str, Any], Any]:
        """Return the card with the metrics of a network, and its predictor.

        Each measurement on the test part is appended to a log; see ``training.evaluation.test_measurements``.

        Args:
            card: the card without metrics.
            network: the network.
            evaluate: function that returns the metrics of a predictor on the test part or on validation data.
            publish: whether the network may be published. The test part is read only if the options allow it, too.
            examples: batches of validation data, from which the reference of the drift is computed.
        """
        predictor, part = self.predictor(card, network), self.options.part if publish else "validation"
        card = {**card, "metrics": evaluate(predictor, part)}
        if part == "test":
            full_card = {"name": self.options.name, **self.provenance(), **card}
            earlier = test_measurements.record(self.options.runs, full_card, self.folder.name)
            card["earlier_readings"] = earlier or None
        if publish and self.options.publish:
            card["reference"] = drift.reference_of(predictor, examples)
        return card, predictor

    def finish(
        self,
        card: dict[str, Any],
        network: torch.nn.Module,
        *pictures: Path,
        publish: bool = True,
        has_curves: bool = True,
    ) -> None:
        """Print the metrics, and publish the network if ``publish`` is true and the options allow it.

        The learning curves are published with ``pictures`` if ``has_curves`` is true. The card (card.json) and the
        weights (model.safetensors) are also written to the run folder.
        """
        card = {"name": self.options.name, **card, **self.provenance()}
        card["speed"] = speed.measure(
            self.predictor(card, network),
            speed.hardware(self.options.device),
            self.limits.speed_seconds,
        )
        curves = self.plot_curves() if has_curves else []
        (self.folder / store.CARD).write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n")
        (self.folder / store.WEIGHTS).write_bytes(encode_weights(network.state_dict()))
        for name, metric in card["metrics"].items():
            bounds = " to ".join(f"{bound:.{metric['decimals']}f}" for bound in metric["interval"] or [])
            interval = f"; 95 % interval {bounds}" if bounds else ""
            first = "; before refit" if metric["weights"] == "before refit" else ""
            print(f"{name:28} {metric['value']:.{metric['decimals']}f}   {metric['split']}{interval}{first}")
        print(speed.describe(card["speed"], card["task"]))
        if publish and self.options.publish:
            options = self.options
            publish_once(options.store, card, network.state_dict(), [*curves, *pictures], options.activate)
        (self.folder / "finished").touch()
        self.lock.close()


def open_folder(options: Options, content: dict[str, Any], lock: contextlib.ExitStack) -> Path:
    """Return a new folder or, with ``--resume``, that of the newest unfinished run with the same config and data.

    The folder is locked until ``lock`` is closed. The operating system releases the locks of killed processes. Runs
    that another process is training are not resumed. Exits with a message if no run can be resumed.

    Args:
        options: the options of the command.
        content: what config.json contains.
        lock: holds the lock of the folder.
    """
    runs = options.runs / options.name
    started = [path.parent for path in runs.glob("*/config.json")]
    unfinished = sorted((folder for folder in started if not (folder / "finished").exists()), reverse=True)
    if options.resume and unfinished:
        changes = {folder: _changes(folder, content) for folder in unfinished}
        fitting = [folder for folder in unfinished if not changes[folder]]
        for folder in fitting:
            with contextlib.suppress(BlockingIOError):
                lock.enter_context(Disk().lock(folder, wait=False))
                return folder
        newest = unfinished[0]
        if not fitting:
            sys.exit(f"{newest} was started with {changes[newest]}: resume it with the same options and data")
        sys.exit(f"{fitting[0]} is still running in another process: wait until it ends, or stop it")
    if options.resume:
        print(f"{runs} holds no unfinished run: starting a new run")
    folder = runs / datetime.now(UTC).strftime("%Y-%m-%dT%H-%M-%S.%f")[:-3]
    folder.mkdir(parents=True)
    lock.enter_context(Disk().lock(folder))
    (folder / "config.tmp").write_text(json.dumps(content, indent=2) + "\n")
    os.replace(folder / "config.tmp", folder / "config.json")
    return folder


def _changes(folder: Path, content: dict[str, Any]) -> str:
    """Return the differences between the config.json of a run and ``content``, or an empty string."""
    before = json.loads((folder / "config.json").read_text())
    changed = [key for key in {**content, **before} if before.get(key) != content.get(key)]
    return ", ".join(f"{key} {before.get(key)} (now {content.get(key)})" for key in changed)


def log_lines(path: Path) -> list[str]:
    """Return the complete lines of a log, or an empty list if the log does not exist."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [line for line in lines if line.endswith("\n")]  # a killed process may leave the last line incomplete


def load_checkpoint(path: Path, objects: dict[str, Any]) -> dict[str, Any]:
    """Restore the tracked ``objects`` from a checkpoint, and return the checkpoint.

    Exits with a message if the checkpoint is damaged, or does not fit the objects.
    """
    advice = "start a new run without --resume"
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # for a damaged file, torch raises errors of many classes
        sys.exit(f"{path} is damaged ({type(error).__name__}); {advice}")
    try:
        for name, tracked in objects.items():
            tracked.load_state_dict(state["tracked"][name])
    except (RuntimeError, KeyError, ValueError) as error:
        sys.exit(f"{path} does not fit this network, for example {str(error)[:200]}; {advice}")
    return state


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint. It replaces the previous checkpoint atomically.

    Exits with a message if it cannot be written, for example because the disk is full. The previous checkpoint is kept.
    """
    new, content = path.with_name("state.tmp"), io.BytesIO()
    torch.save(state, content)  # not to the file, because the errors of torch do not name the cause
    try:
        new.write_bytes(content.getbuffer())
        os.replace(new, path)
    except OSError as error:
        new.unlink(missing_ok=True)
        kept = "; the previous checkpoint is kept, so --resume continues the run" if path.exists() else ""
        sys.exit(f"the checkpoint {new} could not be written ({error.strerror}){kept}")


def configure_cpu(threads: int) -> None:
    """Set the threads of PyTorch, keep freed memory, and flush denormal numbers to zero.

    By default, glibc returns the memory of large tensors to the system, and each page is cleared before its next use.
    Then a sum of tensors of 200 MB takes 7 to 10 times as long. Denormal numbers occur in moving averages and are slow.
    """
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # large pages for tensors of 2 MB and more
    with contextlib.suppress(OSError, AttributeError):  # the C library is not glibc
        malloc = ctypes.CDLL(None)
        malloc.mallopt(M_MMAP_MAX, 0)  # allocate all tensors in the heap, which never shrinks:
        malloc.mallopt(M_TRIM_THRESHOLD, -1)


def run_command(main: Callable[[], int | None]) -> None:
    """Call ``main`` of a training command, and exit with its status.

    Ctrl-C exits with status INTERRUPTED and a message. If a network has returned values that are not
    finite, exit with a message. Bytes of file names that are not UTF-8 are printed as escapes.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\ninterrupted; the same command with --resume continues", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except ArithmeticError as error:
        if type(error) is not ArithmeticError:  # such as a division by zero, which is a defect of the code
            raise
        sys.exit(f"{error}: probably the training diverged; use a lower learning rate")


def new_figure(width: float, height: float) -> Any:
    """Return an empty figure. Its library is imported here, because few commands draw."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Any, path: F, dpi: int = 80, **options: Any) -> F:
    """Save a figure to a path or file, without warnings about characters that the font does not have; return ``path``.

    ``options``: further arguments of ``savefig``.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")
        figure.savefig(path, dpi=dpi, **options)
    return path


def metric(
    value: float | np.ndarray,
    split: str,
    decimals: int = 4,
    weights: str = "published",
    interval: list[float] | None = None,
) -> dict[str, Any]:
    """Return a metric in the form of the card, rounded to ``decimals``; see ``store.Metric``.

    For an array [N], it is the mean with its 95 % interval. The number of booleans, which have a share instead of a
    mean, determines ``decimals``.
    """
    if isinstance(value, np.ndarray):
        values, value = value, float(value.mean())
        if values.dtype == bool:
            decimals, interval = intervals.decimals(len(values)), intervals.wilson(values)
        else:
            interval = intervals.bootstrap(values)
    shown = {"value": round(float(value), decimals), "split": split, "decimals": decimals}
    return {**shown, "interval": interval, "weights": weights}
