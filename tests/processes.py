"""Functions and programs in processes of their own, forked from one that has imported PEFT: milliseconds each.

Neither this package nor anything of the test that asks is imported in that process: a program sees what one that begins
with `import peft` sees. What must start before PEFT is imported is a `subprocess`, and takes seconds.
"""

import contextlib
import multiprocessing
import os
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from types import ModuleType
from typing import Any

_SECONDS = 300.0
_START = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
_CONTEXT = multiprocessing.get_context(_START)
_CONTEXT.set_forkserver_preload(["peft"])


def run_on_two(function: Callable[[Path], None], folder: Path) -> None:
    """Call `function(folder)` in two processes that gloo can connect, and wait for both; what they print shows if they
    fail."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    _run([(function, (folder,), {**world, "RANK": rank, "LOCAL_RANK": rank}) for rank in ("0", "1")])


def run_function(function: Callable[..., None], *arguments: Any, **environment: str) -> None:
    """Call a function of a module in a process of its own; it must end well."""
    _run([(function, arguments, environment)])


def run_program(code: str, *arguments: str) -> str:
    """What a program prints, run as `python -c code *arguments` would be after `import peft`; it must end well."""
    return _run([(_execute, (code, arguments), {})])


def _run(calls: list[tuple[Callable[..., None], tuple, dict[str, str]]]) -> str:
    """What the processes print. One that fails ends the others, which may be waiting for it."""
    with tempfile.TemporaryDirectory() as folder:
        processes = [_CONTEXT.Process(target=_enter, args=(f"{folder}/{i}", *call)) for i, call in enumerate(calls)]
        for process in processes:
            process.start()
        deadline = time.monotonic() + _SECONDS
        while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
            wait([process.sentinel for process in processes if process.is_alive()], 1.0)
            if any(process.exitcode for process in processes):
                deadline = min(deadline, time.monotonic() + 5.0)  # for what the others have to say
        for process in processes:
            process.kill()
            process.join()
        out, errors = (
            "".join(file.read_text("utf-8") for file in sorted(Path(folder).glob(pattern)))
            for pattern in ("*.out", "*.err")
        )
    assert [process.exitcode for process in processes] == [0] * len(calls), out + errors
    return out


def _enter(file: str, function: Callable[..., None], arguments: tuple, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    with open(f"{file}.out", "w", encoding="utf-8") as out, open(f"{file}.err", "w", encoding="utf-8") as errors:
        os.dup2(out.fileno(), 1)
        os.dup2(errors.fileno(), 2)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
            try:
                function(*arguments)
            except BaseException:
                traceback.print_exc()
                raise


def _execute(code: str, arguments: tuple[str, ...]) -> None:
    sys.argv, sys.modules["__main__"] = ["-c", *arguments], ModuleType("__main__")  # where pickle looks for its classes
    exec(compile(code, "<program>", "exec"), vars(sys.modules["__main__"]))
