"""The processes, the machine, and what of them goes into the record."""

import os
import platform
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import accelerate
import peft
import psutil
import tokenizers
import torch
import transformers
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

import lreg_peft
from comparison.errors import UserError
from comparison.options import MAX_THREADS

# Set by `accelerate launch` and `torchrun` for the processes they start.
_LAUNCHERS = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def start_processes() -> PartialState:
    """Join the other processes, if a launcher started several; the first thing a run does.

    Where there is no accelerator this says so: Accelerate would otherwise take the processes of a launcher that did not
    pass `--cpu` on for as many separate runs.
    """
    wants_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=wants_cpu)


def set_threads(n_threads: int | None) -> None:
    """As many threads as the option says, else OMP_NUM_THREADS, else all usable cores."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = max(1, usable // PartialState().num_processes)
    torch.set_num_threads(n_threads or threads_from_environment() or min(share, MAX_THREADS))


def threads_from_environment() -> int | None:
    """OMP_NUM_THREADS if the user has set it; None if not, or if it is no number of threads.

    `accelerate launch` and `torchrun` set it to 1 where it is missing, which would leave all cores but one idle. What
    the launcher itself was started with tells the two cases apart.
    """
    value = os.environ.get("OMP_NUM_THREADS", "")
    if value == "1" and any(name in os.environ for name in _LAUNCHERS):
        try:
            value = psutil.Process().parent().environ().get("OMP_NUM_THREADS", "")
        except (AttributeError, psutil.Error):  # no launcher any more, or not ours to look at
            value = ""
    return int(value) if value.isdecimal() and int(value) > 0 else None


def make_folder(path: Path) -> None:
    """A folder, or one sentence why it cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"The output folder '{path}' cannot be created: {error.strerror}.") from error


# --- memory ---------------------------------------------------------------------------------------------------------


def reset_peak_memory() -> None:
    """Start measuring anew."""
    if PartialState().device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif _CLEAR.exists():
        _CLEAR.write_text("5")  # Linux: forget the highest resident size


def peak_memory() -> int | None:
    """Bytes since the reset: allocated on the GPU, or resident in this process; None where the system does not say."""
    if PartialState().device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    if not _CLEAR.exists():
        return None
    (line,) = (line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return 1024 * int(line.split()[1])


def meaning_of_peak_memory() -> str:
    """What `peak_memory` measured, in words."""
    if PartialState().device.type == "cuda":
        return "allocated by torch on the first GPU, training and evaluation"
    return "resident size of the first process, training and evaluation, with Python, libraries and data"


# --- the record -----------------------------------------------------------------------------------------------------


def provenance(script: str, bf16: bool) -> dict[str, Any]:
    """Command, machine and versions: what one needs to run this again and to judge the speed."""
    state = PartialState()
    on_cpu = state.device.type == "cpu"
    return {
        "command": shlex.join([script, *without_places(sys.argv[1:])]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "device": platform.machine() + " CPU" if on_cpu else torch.cuda.get_device_name(state.device),
        "cores of the machine": os.cpu_count(),
        "threads per process": torch.get_num_threads(),
        "processes": state.num_processes,
        "dtype": "bfloat16 autocast" if bf16 else "float32",
        "peak memory": meaning_of_peak_memory(),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Versions of everything that can move a figure."""
    packages: Sequence[Any] = (lreg_peft, peft, transformers, accelerate, tokenizers, torch)
    return {
        "python": platform.python_version(),
        **{package.__name__: package.__version__ for package in packages},
    }


def without_places(value: Any) -> Any:
    """The same content with names instead of places: `/home/me/model` is `model`, in lists and dictionaries too."""
    if isinstance(value, dict):
        return {key: without_places(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_places(item) for item in value]
    if isinstance(value, str) and os.sep in value and (value.startswith(("/", ".", "~")) or Path(value).exists()):
        return Path(value).name
    return value
