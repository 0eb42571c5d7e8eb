"""Distributed training: gradients and batch norms over all shards equal those of training in one process."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys

import pytest
import torch.distributed as dist
from support.service import ROOT

from training import options
from training.loops import distributed

ONE_OF_TWO = """
import os
from unittest import mock

import torch
from torch import nn
from training.loops import distributed as processes
from training.loops.text.elman_recurrence import dropout

torch.set_num_threads(1)
processes.initialize("cpu")

def network():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.4), nn.GELU(),
        nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, affine=False, momentum=None), nn.Flatten(), nn.Linear(4, 2),
    )

torch.manual_seed(0)
batch, alone, shared = torch.randn(8, 3, 5, 5), network(), network()
together = processes.data_parallel(shared)
for _ in range(3):
    for forward, own, images in ((alone, alone, batch), (together, shared, processes.shard(batch))):
        own.zero_grad()
        forward(images).square().mean().backward()
    for one, two in zip(alone.parameters(), shared.parameters(), strict=True):
        assert torch.allclose(one.grad, two.grad, atol=1e-6)
for key, tensor in alone.state_dict().items():
    assert torch.allclose(tensor.float(), shared.state_dict()[key].float(), atol=1e-6), key
assert torch.equal(processes.gather(processes.shard(batch)), batch)
for rows in (0, 1):
    outputs = {}
    for world, rank in (("1", "0"), ("2", os.environ["RANK"])):
        with mock.patch.dict(os.environ, {"WORLD_SIZE": world, "RANK": rank}):
            torch.manual_seed(rows)
            outputs[world] = dropout(processes.shard(torch.ones(6, 8, 5), rows), 0.3, rows)
    assert torch.equal(outputs["2"], processes.shard(outputs["1"], rows))
assert processes.any_rank(processes.rank() == 1)
assert not processes.any_rank(False)
assert processes.from_rank_zero(lambda: processes.rank() + 5) == 5
processes.print_once("printed once")
processes.exit_process()
"""


def test_gradients_and_batch_norms_of_two_processes_equal_those_of_one() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, sys.executable, "-W", "error::FutureWarning", "-c", ONE_OF_TWO],
        capture_output=True,
        text=True,
        timeout=200,
        env=environment,
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.count("printed once") == 1


@pytest.mark.parametrize("stem", ["cnn", "rnn", "lstm", "gan"])
def test_ctrl_c_outside_the_training_steps_ends_a_command_with_one_line(
    stem: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(options, "parse_options", interrupt)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "training" / f"{stem}.py"), run_name="__main__")
    assert end.value.code == 130
    assert capsys.readouterr().err == "\ninterrupted; the same command with --resume continues\n"


def test_ctrl_c_ends_one_of_several_processes_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    def end(status: int) -> None:
        raise SystemExit(f"at once with status {status}")

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(os, "_exit", end)
    with pytest.raises(SystemExit, match="at once with status 130"):
        distributed.run_command(interrupt)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("error", "end", "message"),
    [
        (
            ArithmeticError("forecasts are not finite"),
            SystemExit,
            "^forecasts are not finite: probably the training di",
        ),
        (ZeroDivisionError("division by zero"), ZeroDivisionError, "^division by zero$"),
    ],
)
def test_a_network_without_finite_outputs_ends_a_command_with_a_message(
    error: Exception, end: type[BaseException], message: str
) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(end, match=message):
        distributed.run_command(fail)
