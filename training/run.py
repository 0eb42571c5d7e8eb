"""Training runs, for all training commands: progress bar, checkpoints, learning curves and publishing.

All random numbers of a step depend only on the seed and the step. So a run that was killed and resumed ends with the
same weights as an uninterrupted run.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
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
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from app import store
from app.store.version import Version, encode_weights
from app.tasks import TASKS
from training import evaluation_log
from training.checkpoints import checkpoint
from training.checkpoints.run_folder import log_lines, open_folder
from training.evaluation import speed
from training.loops import distributed
from training.options import Options, Part
from training.publishing import code_digest, commit, publish_once, runnable

P = TypeVar("P")  # the class of a predictor

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # from glibc's malloc.h
SAVE_EVERY = 20  # seconds between two checkpoints
WARM_UP = 0.05  # share of the training steps during which the learning rate rises


def cosine_schedule(step: int, total: int) -> float:
    """Return the factor of the learning rate: linear during ``WARM_UP``, then a cosine to 0. For a single step: 1."""
    if total == 1:
        return 1.0
    done = (step + 1) / total
    if done < WARM_UP:
        return done / WARM_UP
    return 0.5 * (1 + math.cos(math.pi * (done - WARM_UP) / (1 - WARM_UP)))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = rate


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
        tensors: further tensors of a checkpoint, which are divided among the processes along the first dimension.
        refitting: whether the second training, on all data, has begun; see ``begin_refit``.
        lock: in the first process, holds the lock of the folder until the run is finished or interrupted.

    ``data`` is the digest of the user's data, or None for public data. A run can be resumed only with the same config
    and the same data, and measured only on the part of the data for which it was started.
    """

    def __init__(self, options: Options, config: Any, argv: Sequence[str] | None, data: str | None = None) -> None:
        self.options = options
        processes = distributed.world_size()
        python = ["python"] if processes == 1 else ["torchrun", "--nproc-per-node", str(processes)]
        arguments = [word for word in (sys.argv[1:] if argv is None else argv) if word != "--resume"]
        self.command = shlex.join([*python, "-m", options.script, *arguments])
        self.commit = commit()
        self.tracked: dict[str, Any] = {}
        self.tensors: dict[str, torch.Tensor] = {}
        self.step, self.seconds = 0, 0.0
        self.resumed: list[str] = []
        self._code_before = ""  # commit and version of PyTorch that wrote the checkpoint, if one was loaded
        self.latest_metrics: dict[str, float] = {}
        self.is_timing = self.refitting = False
        self.own_data = data is not None
        configure_cpu(options.threads)
        distributed.initialize(options.device)
        torch.manual_seed(options.seed)
        content = {"seed": options.seed, "part": options.part, **dataclasses.asdict(config)}
        if teachers := options.data_options.get("teachers"):
            content["teachers"] = [str(folder) for folder in teachers]
        if data is None and (origin := options.data_options.get("origin")):
            content["origin"] = origin
        if data is not None:
            own = {key: str(value) for key, value in options.data_options.items() if value is not None}
            content |= {"minutes": options.minutes, "data": data, **own}
        content = json.loads(json.dumps(content))
        self.lock = contextlib.ExitStack()
        self.folder = distributed.from_rank_zero(lambda: open_folder(options, content, self.lock))
        self.tensorboard = self._open_tensorboard()

    def _open_tensorboard(self) -> Any:
        """Return a TensorBoard writer if ``--log-dir`` is given and this is the first process; otherwise None.

        Each run has its own sub-folder.
        """
        if self.options.log_dir is None or distributed.rank():
            return None
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self.options.log_dir / self.options.name / self.folder.name))

    def begin_refit(self) -> None:
        """Begin the second training, on all data. It has its own steps, log and checkpoint.

        Call this method after the last step of the first training. If the run is resumed later, the first training has
        no steps left, and the second training continues.
        """
        self.refitting, self.step, self._code_before = True, 0, ""
        self.tracked, self.tensors, self.latest_metrics = {}, {}, {}

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
            if distributed.rank() == 0:
                self._log.unlink(missing_ok=True)  # from a run that was killed before its first checkpoint
            return
        state = checkpoint.load(path, objects, self.commit)
        device = self.options.device
        self.tensors.update({name: distributed.shard(whole.to(device)) for name, whole in state["tensors"].items()})
        self.step, self.seconds, self.resumed = state["step"], state["seconds"], state["resumed"]
        self._code_before = _code(state.get("commit", "unknown"), state.get("torch", "unknown"))
        if distributed.rank():
            return
        lines = [line for line in log_lines(self._log) if json.loads(line)["step"] <= self.step]
        self._log.write_text("".join(lines))
        print(f"{self.folder}: resumed at step {self.step}")

    def save(self) -> None:
        """Write a checkpoint. It replaces the previous checkpoint atomically."""
        tensors = {name: distributed.gather(part) for name, part in self.tensors.items()}
        if distributed.rank():
            return
        tracked = {name: tracked.state_dict() for name, tracked in self.tracked.items()}
        state = {"tracked": tracked, "tensors": tensors, "step": self.step, "seconds": self.seconds}
        state |= {"code": code_digest(), "commit": self.commit, "torch": str(torch.__version__)}
        state["resumed"] = self.resumed
        checkpoint.save(self._checkpoint, state)

    def steps(self, total: int | Callable[[], int]) -> Iterator[int]:
        """Yield the number of each remaining step, and show a progress bar. Each step has its own random seed.

        ``total``: the number of steps, or a function that returns it and may change it during training.
        Ctrl-C finishes the current step, writes a checkpoint and exits with the command that resumes the run.
        """
        interrupted = False

        def interrupt(*_: object) -> None:
            nonlocal interrupted
            interrupted = True

        count = total if callable(total) else lambda: total
        last_step = count()
        before, after = self._code_before, _code(self.commit, torch.__version__)
        if before and (self.step < last_step or before != after):
            place = f"step {self.step}" if self.step < last_step else f"after the last step, {self.step}"
            training = " of the training on all data" if self.refitting else ""
            self.resumed.append(f"{place}{training}; before: {before}; after: {after}")
        handler = signal.signal(signal.SIGINT, interrupt)
        saved = last = time.monotonic()
        bar = tqdm(
            total=last_step,
            initial=self.step,
            desc=f"{self.options.name}, all data" if self.refitting else self.options.name,
            unit="step",
            dynamic_ncols=True,
            disable=distributed.rank() > 0,
        )
        try:
            while self.step < last_step:
                torch.manual_seed(derive_seed(self.options.seed, "step", self.step))
                yield self.step
                self.step += 1
                now = time.monotonic()
                self.seconds, last = self.seconds + now - last, now
                last_step = bar.total = count()
                interrupted = distributed.any_rank(interrupted)
                if interrupted or self.step == last_step or distributed.any_rank(now - saved > SAVE_EVERY):
                    self._check_weights()
                    self.save()
                    saved = now
                bar.set_postfix({key: f"{value:.4g}" for key, value in self.latest_metrics.items()}, refresh=False)
                bar.update()
                if interrupted:
                    bar.close()
                    self.lock.close()
                    if distributed.rank():
                        sys.exit(1)
                    command = f"{runnable(self.command)} --resume"
                    sys.exit(f"saved {self.folder} at step {self.step} of {last_step}; resume with: {command}")
        finally:
            bar.close()
            signal.signal(signal.SIGINT, handler)

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
        if distributed.rank():
            return
        with self._log.open("a") as file:
            file.write(json.dumps({"step": self.step + 1, **metrics}) + "\n")
        if self.tensorboard is not None:
            for name, value in metrics.items():
                self.tensorboard.add_scalar(f"refit_{name}" if self.refitting else name, value, self.step + 1)
            self.tensorboard.flush()

    def time_evaluation(self, evaluate: Callable[[], float]) -> float:
        """Run ``evaluate`` once to measure its time, and return the seconds. Nothing is printed or published.

        ``evaluate`` may call ``finish``. It returns the estimated seconds of the parts of the evaluation that it omits.
        These seconds are added to the measured time.
        """
        start, self.is_timing = time.monotonic(), True
        with torch.random.fork_rng(), contextlib.redirect_stdout(io.StringIO()):
            further = evaluate()
        self.is_timing = False
        return time.monotonic() - start + further

    def write_file(self, name: str, text: str) -> None:
        """Write a file to the run's folder, in the first process only."""
        if distributed.rank() == 0:
            (self.folder / name).write_text(text, "utf-8", "backslashreplace")  # file names may not be UTF-8

    def plot_curves(self) -> Path:
        """Plot every metric of metrics.jsonl over the steps, write the plots to curves.png, and return its path."""
        from matplotlib.figure import Figure

        records = [json.loads(line) for line in log_lines(self.folder / "metrics.jsonl")]
        names = list(dict.fromkeys(name for record in records for name in record if name not in ("step", "epoch")))
        figure = Figure(figsize=(4.2 * max(1, len(names)), 3.2), layout="constrained")
        axes = figure.subplots(1, max(1, len(names)), squeeze=False)[0]
        for name, axis in zip(names, axes, strict=False):
            points = [(record["step"], record[name]) for record in records if name in record]
            axis.plot(*zip(*points, strict=True), linewidth=1.2)
            axis.set(title=name.replace("_", " "), xlabel="step")
            axis.grid(alpha=0.3)
        return save_figure(figure, self.folder / "curves.png")

    def provenance(self) -> dict[str, Any]:
        """Return the fields of the card that describe the run."""
        return {
            "seed": self.options.seed,
            "command": self.command,
            "commit": self.commit,
            "resumed": self.resumed or None,
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "hardware": _hardware(self.options),
            "minutes": round(self.seconds / 60, 1),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }

    def predictor(self, predictor: Callable[..., P], card: dict[str, Any], network: torch.nn.Module) -> P:
        """Load the trained network with the serving code, so that measurements use the predictions of the service."""
        full_card = store.Card.model_validate(
            {"name": self.options.name, "version": 1, "metrics": {}, "weights_sha256": "", **card, **self.provenance()}
        )
        tensors = {key: tensor.detach().cpu() for key, tensor in network.state_dict().items()}
        return predictor(Version(self.folder, full_card, tensors), torch.device(self.options.device))

    def measure(
        self, card: dict[str, Any], evaluate: Callable[[Part], dict[str, Any]], publish: bool = True
    ) -> dict[str, Any]:
        """Return the card with the metrics of ``evaluate``, on the test part or on validation data.

        The test part is read only if ``publish`` is true and the options allow it. Each measurement on the test part is
        appended to a log; see ``training.evaluation_log``.
        """
        part = self.options.part if publish else "validation"
        card = {**card, "metrics": evaluate(part)}
        if part == "test" and not self.is_timing:
            full_card = {"name": self.options.name, **self.provenance(), **card}
            evaluation_log.record(self.options.runs, full_card, self.own_data)
        return card

    def finish(
        self, card: dict[str, Any], network: torch.nn.Module, pictures: dict[str, Path], publish: bool = True
    ) -> None:
        """Print the metrics, and publish the network if ``publish`` is true and the options allow it.

        The card (card.json) and the weights (model.safetensors) are also written to the run folder.
        """
        card = {"name": self.options.name, **card, **self.provenance()}
        card["speed"] = speed.measure(
            self.predictor(TASKS[card["task"]].predictor, card, network), card["hardware"].partition(", threads")[0]
        )
        if self.is_timing:
            return
        (self.folder / store.CARD).write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n")
        (self.folder / store.WEIGHTS).write_bytes(encode_weights(network.state_dict()))
        for name, metric in card["metrics"].items():
            print(f"{name:28} {metric['value']:.{metric['decimals']}f}   {metric['split']}")
        print(speed.describe(card["speed"], card["task"]))
        if publish and self.options.publish:
            publish_once(self.options.store, card, network, pictures)
        if self.tensorboard is not None:
            self.tensorboard.close()
        (self.folder / "finished").touch()
        self.lock.close()


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


def save_figure(figure: Any, path: Path, dpi: int = 80) -> Path:
    """Save a figure, without warnings about characters that the font does not have; return the path."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")
        figure.savefig(path, dpi=dpi)
    return path


def metric(value: float, split: str, decimals: int = 4) -> dict[str, Any]:
    """Return a metric in the form of the card, rounded to ``decimals``."""
    return {"value": round(float(value), decimals), "split": split, "decimals": decimals}


def _code(commit: str, version: str) -> str:
    return f"commit {commit}, torch {version}"


def _hardware(options: Options) -> str:
    if options.device.startswith("cuda"):
        return torch.cuda.get_device_name(options.device)
    return f"{speed.processor()}, threads: {options.threads}"
