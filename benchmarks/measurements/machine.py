"""What a measurement ran on: goes into every record of times, since their ratios depend on it."""

import platform
import sys
from importlib.metadata import version
from pathlib import Path

import torch


def processor() -> str:
    """Name of the processor, and the widest instructions that torch uses on it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def device_name(device: str) -> str:
    """Of the processor, or of the GPU."""
    return processor() if device == "cpu" else torch.cuda.get_device_name()


def versions(*packages: str) -> dict[str, str]:
    """Of Python and of what decides about times."""
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def command() -> str:
    """The command that is running, with names in place of folders."""
    return " ".join(Path(part).name if "/" in part else part for part in sys.argv)
