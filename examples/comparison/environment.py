"""The processes, the machine, what of them goes into the record; and loading by name."""

import os
import platform
import shlex
import sys
import urllib.error
import urllib.request
from functools import cache
from pathlib import Path
from typing import Any

import accelerate
import huggingface_hub.constants
import peft
import tokenizers
import torch
import transformers
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

import lreg_peft
from examples.comparison.options import UserError

MAX_THREADS = 8  # small models cannot feed more
OFFLINE_HINT = (
    "without a hub, run with no arguments or give local text with --train_file and --validation_file, or GLUE's own "
    "files with --data_dir"
)


def start_processes(num_threads: int | None, output_dir: str) -> PartialState:
    """Join the other processes, if a launcher started several, and make the output folder.

    Where there is no accelerator this says so: Accelerate would otherwise take the processes of a launcher that did not
    pass `--cpu` on for as many separate runs.

    Args:
        num_threads: per process. None takes OMP_NUM_THREADS, unless it is the 1 that launchers set where nobody has
            set it; then the cores, divided among the processes, at most 8.
        output_dir: folder of all results.
    """
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())
    launched = any(name in os.environ for name in ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"))
    if num_threads is None and launched and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        num_threads = min(max(1, usable // state.num_processes), MAX_THREADS)
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"The output folder '{output_dir}' cannot be created: {error.strerror}.") from error
    return state


def peak_memory(reset: bool = False) -> int | None:
    """The most bytes since the last reset: that torch had allocated on the first GPU, or resident ones of this process.

    None on a CPU whose system does not tell: Linux does. A process keeps some of what earlier runs freed, so methods
    are to be compared between processes of one run each.
    """
    if PartialState().device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak
        (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    except (OSError, ValueError):
        return None
    return 1024 * int(line.split()[1])


def provenance(script: str, bf16: bool) -> dict[str, Any]:
    """Command, machine and versions: what one needs to run this again and to judge the speed."""
    state = PartialState()
    packages: tuple[Any, ...] = (lreg_peft, peft, transformers, accelerate, tokenizers, torch)
    on_cpu = state.device.type == "cpu"
    return {
        "command": shlex.join([script, *without_places(sys.argv[1:])]),
        "device": platform.machine() + " CPU" if on_cpu else torch.cuda.get_device_name(state.device),
        "threads per process": torch.get_num_threads(),
        "processes": state.num_processes,
        "dtype": "bfloat16 autocast" if bf16 else "float32",
        "versions": {"python": platform.python_version(), **{p.__name__: p.__version__ for p in packages}},
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


# --- loading by name ------------------------------------------------------------------------------------------------


@cache
def prefer_cache_if_unreachable() -> None:
    """Ask the hub once whether it is there; if not, let the Hugging Face libraries look into their cache only.

    Their own way to find out is five retries with growing pauses for every file: more than a minute of warnings.
    """
    try:
        urllib.request.urlopen(huggingface_hub.constants.ENDPOINT, timeout=10.0).close()
    except urllib.error.HTTPError:
        return  # an answer, whatever it says
    except (OSError, ValueError):
        import datasets.config  # here, because most runs do not need it and it is slow to import

        huggingface_hub.constants.HF_HUB_OFFLINE = True
        datasets.config.HF_HUB_OFFLINE = True


def load_pretrained(auto_class: Any, name: str, **options: Any) -> Any:
    """`auto_class.from_pretrained` for a local folder or a hub id."""
    is_folder = Path(name).is_dir()
    if not is_folder:
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise UserError(f"The model folder '{name}' does not exist.")
        prefer_cache_if_unreachable()
    try:
        return auto_class.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        place = "its folder" if is_folder else "the hub"
        hint = "" if is_folder else f"; {OFFLINE_HINT}"
        raise UserError(f"Could not load '{name}' from {place} ({first_line(error)}){hint}.") from error


def load_dataset(name: str, config: str | None) -> Any:
    """`datasets.load_dataset` with all splits."""
    import datasets

    datasets.disable_progress_bars()
    prefer_cache_if_unreachable()
    try:
        return datasets.load_dataset(name, config)
    except Exception as error:  # the library raises a different type for each way a download can fail
        raise UserError(
            f"Could not load the data set '{name}' from the hub ({first_line(error)}); {OFFLINE_HINT}."
        ) from error


def first_line(error: BaseException) -> str:
    """The beginning of an error's message, or its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".: ") if lines else type(error).__name__
