"""The device on which the networks run, its threads, and the memory of the process."""

from __future__ import annotations

import contextlib
import ctypes

import torch

from app.settings import SettingsError


def find_device(name: str, gpus: int | None = None) -> torch.device:
    """Return the torch device with this name. ``auto`` means the first GPU, or the CPU if there is no GPU.

    ``gpus`` is the number of GPUs; by default, the number that torch can use.

    Raises:
        SettingsError: there is no such GPU.
    """
    count = (torch.cuda.device_count() if torch.cuda.is_available() else 0) if gpus is None else gpus
    if name == "auto":
        return torch.device("cuda:0" if count else "cpu")
    kind, _, index = name.partition(":")
    if kind == "cuda" and int(index or 0) >= count:  # compared before torch, which reads cuda:256 as cuda:0
        available = f"there are {count} GPUs" if count else "there is no GPU that torch can use"
        raise SettingsError(
            f"QUARTET_DEVICE is {name!r}: {available}; allowed values: auto, cpu" + (", cuda:N" if count else "")
        )
    return torch.device(name)


def limit_threads() -> None:
    """Let the current thread compute with the number of threads that was passed to ``torch.set_num_threads``.

    Otherwise, oneDNN uses all cores in a new thread, until an operation of torch that may use several threads has run
    in this thread. In one benchmark on two cores, two workers then computed LSTMs 70 times more slowly.
    """
    torch.get_num_threads()  # sets the number of OpenMP threads of the current thread


def trim_heap() -> None:
    """Return free heap memory to the operating system, because warming up needs more memory than serving."""
    with contextlib.suppress(OSError, AttributeError):  # the C library is not glibc
        ctypes.CDLL(None).malloc_trim(0)
