"""Killing a job between any two of its operations on files, in forked children; and counting those operations."""

import io
import os
import random
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

_AUDITED = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink"}


class _Counter:
    """Counts what the process does to files below a folder, and kills it before operation `deadly`."""

    def __init__(self, folder: Path, deadly: int | None) -> None:
        self.folder, self.deadly, self.count = os.path.realpath(folder), deadly, 0

    def __call__(self, event: str, arguments: tuple) -> None:
        if event in _AUDITED and any(self._is_inside(argument) for argument in arguments[:2]):
            self.tick()

    def _is_inside(self, argument: object) -> bool:
        return isinstance(argument, (str, os.PathLike)) and os.path.abspath(argument).startswith(self.folder)

    def tick(self) -> None:
        if self.count == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        self.count += 1

    def watch(self) -> None:
        """Begin; for the rest of this process, since audit hooks cannot be taken back."""
        sys.addaudithook(self)
        own = os.fsync

        def fsync(descriptor: int) -> None:
            self.tick()
            own(descriptor)

        os.fsync = fsync
        # Torch, safetensors and Python itself write by the descriptor, out of sight of the hooks above.
        opened = io.open

        def open_(file: object, mode: str = "r", *arguments: object, **options: object):
            stream = opened(file, mode, *arguments, **options)
            if set(mode) & set("wax+") and self._is_inside(file):
                return _Watched(stream, self)
            return stream

        io.open = open_
        import builtins

        builtins.open = open_


class _Watched:
    """A file whose every write can be the last; half of a write may have happened."""

    def __init__(self, stream, counter: _Counter) -> None:
        self._stream, self._counter = stream, counter

    def write(self, data):
        if self._counter.count == self._counter.deadly:
            self._stream.write(data[: len(data) // 2])
            self._stream.flush()
        self._counter.tick()
        return self._stream.write(data)

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def __enter__(self):
        self._stream.__enter__()
        return self

    def __exit__(self, *arguments):
        return self._stream.__exit__(*arguments)

    def __iter__(self):
        return iter(self._stream)


def _fork(job: Callable[[], None], folder: Path, deadly: int | None) -> tuple[int, int]:
    """Run a job in a child: how it ended (0, or minus the signal), and how many operations it made."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads; the child uses none
        child = os.fork()
    if child == 0:
        code = 1
        try:
            counter = _Counter(folder, deadly)
            counter.watch()
            job()
            os.write(writer, str(counter.count).encode())
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writer)
    _, status = os.waitpid(child, 0)
    count = int(os.read(reader, 100) or b"0")
    os.close(reader)
    return os.waitstatus_to_exitcode(status), count


def count_operations(job: Callable[[], None], folder: Path) -> int:
    """How many operations on files below `folder` the job makes."""
    code, count = _fork(job, folder, None)
    assert code == 0
    return count


def kill_at(job: Callable[[], None], folder: Path, operation: int) -> bool:
    """Run the job and kill it before an operation; False if it came to its end before."""
    code, _ = _fork(job, folder, operation)
    assert code in (0, -signal.SIGKILL)
    return code != 0


def instants(total: int, at_most: int, seed: int = 0) -> list[int]:
    """All of `total` operations, or some that the seed chooses."""
    return sorted(random.Random(seed).sample(range(total), min(total, at_most)))
