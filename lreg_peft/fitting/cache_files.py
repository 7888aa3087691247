"""The files of a feature cache: how they are written so that neither a kill nor a second job can spoil them.

A complete cache is a folder of `stamp.json`, which says what it was made from, and per process ("shard") one file each
of `features`, `targets` and `offsets`; the last is a .npy array, followed by a line of JSON with the checksums of all
three. It is built in a folder next to its place, under a lock that ends with the process that holds it, and renamed
when complete. Whatever is replaced is written under another name, flushed to the disk, and renamed: after a kill at
any moment there is either the old or the new.
"""

import errno
import io
import json
import os
import re
import secrets
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

#: The first had no checksums.
FORMAT = 2
READABLE = (1, FORMAT)
STAMP = "stamp.json"
DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}

_LOCK = "lock"
_OWN_FILES = re.compile(r"(features|targets)-\d+\.bin|offsets-\d+\.npy(\.new)?|(stamp|progress-\d+)\.json(\.new)?|lock")
_LEFT_OVER = re.compile(r".*\.new|progress-\d+\.json|lock")
_BLOCK = 1 << 24


class WriteError(OSError):
    """The disk is full or cannot be written."""


def damaged(file: Path, what: str) -> ValueError:
    """The error for a file that is not as it was written."""
    name = f"the {STAMP} is damaged, it" if file.name == STAMP else str(file)
    return ValueError(
        f"the feature cache at {file.parent} is damaged: {name} {what}. Build it again: cache_features(..., "
        "overwrite=True)."
    )


@contextmanager
def writing(path: Path, bytes_per_row: int) -> Iterator[None]:
    """Turn errors of the disk into one that says what becomes of the cache at `path`."""
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        advice = ""
        if error.errno == errno.ENOSPC:
            advice = f" A row takes {bytes_per_row} bytes: free space, or store less."
        text = f"the feature cache could not be written to {path}: {error}. Nothing was left behind.{advice}"
        raise WriteError(error.errno or errno.EIO, text) from error


# Stamps


def read_stamp(folder: Path) -> dict[str, Any] | None:
    """What `stamp.json` says; None if there is none.

    Raises:
        ValueError: if it is damaged.
    """
    file = folder / STAMP
    try:
        stamp = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise damaged(file, f"holds no JSON ({error})") from None
    if not isinstance(stamp, dict):
        raise damaged(file, f"holds a {type(stamp).__name__} in place of an object")
    return stamp


def check_stamp(folder: Path, stamp: Mapping[str, Any]) -> None:
    """Raise a `ValueError` for a stamp that no complete cache has."""

    def is_whole(name: str, lowest: int) -> bool:
        value = stamp.get(name)
        return isinstance(value, int) and not isinstance(value, bool) and value >= lowest

    file = folder / STAMP
    if not (is_whole("format", 1) and stamp["format"] in READABLE):
        raise ValueError(
            f"the feature cache at {folder} has the format {stamp.get('format')!r}, and this version of lreg_peft "
            f"reads {' and '.join(map(str, READABLE))}. Build it again with cache_features."
        )
    for name, lowest in (("shards", 1), ("in_features", 1), ("target_width", 0)):
        if not is_whole(name, lowest):
            raise damaged(file, f"gives {name}={stamp.get(name)!r}, which must be a whole number of at least {lowest}")
    objectives = ("cross_entropy", "binary_cross_entropy", "squared_error")
    for name, allowed in (("dtype", tuple(DTYPES.values())), ("objective", objectives)):
        if stamp.get(name) not in allowed:
            raise damaged(file, f"gives {name}={stamp.get(name)!r}, which must be one of {', '.join(allowed)}")
    if (stamp["objective"] == "cross_entropy") != (stamp["target_width"] == 0):
        raise damaged(file, f"gives target_width={stamp['target_width']} for the objective {stamp['objective']!r}")


def replace_file(file: Path, data: bytes) -> None:
    """Write a file so that after a kill there is either the old one or the new one."""
    temporary = file.with_name(file.name + ".new")
    with temporary.open("wb", buffering=0) as new:
        write_all(new, data)
        os.fsync(new.fileno())
    os.replace(temporary, file)
    _sync_folder(file.parent)


def write_all(file: io.RawIOBase | BinaryIO, data: bytes | memoryview) -> None:
    """Write to a file without buffer, which may take less than it is given."""
    rest = memoryview(data)
    while rest.nbytes:
        rest = rest[file.write(rest) or 0 :]


def _sync_folder(folder: Path) -> None:
    with suppress(OSError):  # not every system can
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# Folders


def foreign_files(folder: Path) -> list[str]:
    """Names of what no cache writes."""
    return sorted(entry.name for entry in folder.iterdir() if not _OWN_FILES.fullmatch(entry.name) or entry.is_dir())


def remove(folder: Path) -> None:
    """Delete the files that a cache has written, and the folder if that leaves it empty."""
    with suppress(FileNotFoundError, NotADirectoryError):
        for entry in folder.iterdir():
            if _OWN_FILES.fullmatch(entry.name) and not entry.is_dir():
                entry.unlink(missing_ok=True)
        with suppress(OSError):
            folder.rmdir()


def tidy(folder: Path) -> None:
    """Delete what a kill between renaming and cleaning up has left in a complete cache, and what it replaced."""
    for entry in folder.iterdir():
        if _LEFT_OVER.fullmatch(entry.name):
            entry.unlink(missing_ok=True)
    for old in _beside(folder, "old"):
        remove(old)


def _beside(path: Path, kind: str) -> list[Path]:
    name = re.compile(rf"{re.escape(path.name)}\.{kind}(-[0-9a-f]+)?")
    if not path.parent.is_dir():
        return []
    return sorted(entry for entry in path.parent.iterdir() if name.fullmatch(entry.name) and entry.is_dir())


class Building:
    """A folder in which one job at a time builds the cache that will be at `path`; made by `begin`.

    Attributes:
        folder: where to build.
    """

    def __init__(self, path: Path, folder: Path, lock: BinaryIO | None) -> None:
        self._path, self.folder, self._lock = path, folder, lock

    @classmethod
    def begin(cls, path: Path, stamp: Mapping[str, Any], keys: Iterable[str]) -> "Building":
        """Go on in a folder that was left with this stamp, as far as `keys` go, or start a new one.

        A folder that another job holds is left alone: two jobs build in two folders, and the first to be complete
        gets the place. What is left of other attempts is deleted.
        """
        keys = list(keys)
        path.parent.mkdir(parents=True, exist_ok=True)
        for folder in _beside(path, "partial"):
            held = _take(folder)
            if held is None:
                continue
            if _has(folder, stamp, keys):
                return cls(path, folder, held)
            remove(folder)
            held.close()
        held = None
        folder = path.with_name(f"{path.name}.partial")
        with suppress(FileExistsError):
            folder.mkdir()
            held = _take(folder)
        if held is None:  # somebody else is in there
            folder = path.with_name(f"{path.name}.partial-{secrets.token_hex(6)}")
            folder.mkdir()
            held = _take(folder)  # None where the file system has no locks: nobody will take it over then
        try:
            replace_file(folder / STAMP, json.dumps(stamp).encode())
        except BaseException:
            remove(folder)
            if held is not None:
                held.close()
            raise
        return cls(path, folder, held)

    def discard(self) -> None:
        """Delete the folder."""
        remove(self.folder)

    def put_in_place(self) -> bool:
        """Make the folder, complete by now, the cache; False if there is one at `path` already.

        What was there before has to be moved away by `move_away`.
        """
        try:
            os.replace(self.folder, self._path)  # onto an empty folder at most
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST) or self._path.exists():
                return False
            raise
        _sync_folder(self._path.parent)
        self.folder = self._path
        tidy(self._path)
        return True

    def release(self) -> None:
        """Let another job have the folder."""
        if self._lock is not None:
            self._lock.close()


def move_away(path: Path) -> None:
    """Take a cache out of its place under a name from which `tidy` deletes it."""
    with suppress(FileNotFoundError):
        os.replace(path, path.with_name(f"{path.name}.old-{secrets.token_hex(6)}"))


def _take(folder: Path) -> BinaryIO | None:
    """The lock of a folder, held as long as the file is open; None if somebody else has it."""
    if fcntl is None:
        return None
    try:
        file = (folder / _LOCK).open("ab", buffering=0)
    except FileNotFoundError:  # the folder has gone
        return None
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(file.fileno()).st_ino == os.stat(folder / _LOCK).st_ino:
            return file
    except OSError:  # held; or the file system has no locks; or the folder has gone
        pass
    file.close()
    return None


def _has(folder: Path, stamp: Mapping[str, Any], keys: list[str]) -> bool:
    try:
        found = read_stamp(folder)
    except ValueError:
        return False
    return found is not None and all(found.get(key) == stamp[key] for key in keys)


# Shards


class Shard:
    """The files of one process, which grow batch by batch and know where they may go on."""

    def __init__(self, folder: Path, rank: int, dtype: torch.dtype, in_features: int = 0) -> None:
        self.dtype = dtype
        self._progress = folder / f"progress-{rank}.json"
        self._offsets_file = folder / f"offsets-{rank}.npy"
        self._names = [folder / f"{kind}-{rank}.bin" for kind in ("features", "targets")]
        self._in_features = in_features
        self._restart()
        try:
            self._recover()
        except (OSError, ValueError, KeyError, TypeError):  # killed before the first checkpoint, or damaged since
            self._restart()
        self._files = []
        try:
            for name, size in zip(self._names, self._sizes, strict=True):
                file = name.open("r+b" if name.exists() else "w+b", buffering=0)
                self._files.append(file)
                file.truncate(size)
                file.seek(size)
        except BaseException:
            self.close()
            raise

    def _restart(self) -> None:
        self.batches = self.rows = self.target_width = 0
        self.objective: str | None = None
        self._offsets = [0]
        self._sizes, self._sums = [0, 0], [0, 0]

    def _recover(self) -> None:
        """Take over what the last checkpoint says, if all of it is there."""
        state = json.loads(self._progress.read_text(encoding="utf-8"))
        offsets, _ = read_offsets(self._offsets_file, None)
        offsets = offsets[: state["samples"] + 1]
        check_offsets(self._offsets_file, offsets)
        for name, size, expected in zip(self._names, state["bytes"], state["checksums"], strict=True):
            if checksum(name, size) != expected:
                raise damaged(name, "is not what the last checkpoint left")
        if len(offsets) != state["samples"] + 1 or zlib.crc32(offsets.tobytes()) != state["offsets"]:
            raise damaged(self._offsets_file, "is not what the last checkpoint left")
        self._offsets, self.rows = offsets.tolist(), int(offsets[-1])
        self._sizes, self._sums = list(state["bytes"]), list(state["checksums"])
        self.batches, self.target_width, self.objective = state["batches"], state["target_width"], state["objective"]

    def append(self, rows: Any, counts: list[int]) -> None:
        """Write one batch, `counts` rows for each of its samples."""
        targets = rows.targets
        if targets.is_floating_point():
            self.target_width = targets.shape[1]
            targets = targets.float()
        self._write(0, rows.features.to(self.dtype))
        self._write(1, targets)
        for count in counts:
            self._offsets.append(self._offsets[-1] + count)
        self.rows = self._offsets[-1]
        self.batches += 1

    def _write(self, i: int, tensor: Tensor) -> None:
        data = bytes_of(tensor)
        write_all(self._files[i], data)
        self._sizes[i] += len(data)
        self._sums[i] = zlib.crc32(data, self._sums[i])

    def checkpoint(self) -> None:
        """Make sure that what was written so far survives."""
        for file in self._files:
            os.fsync(file.fileno())
        offsets = np.asarray(self._offsets, dtype=np.int64)
        sums = {"features": self._sums[0], "targets": self._sums[1], "offsets": zlib.crc32(offsets.tobytes())}
        shape = {"dtype": DTYPES[self.dtype], "in_features": self._in_features, "target_width": self.target_width}
        data = io.BytesIO()
        np.save(data, offsets)
        replace_file(self._offsets_file, data.getvalue() + json.dumps({**sums, **shape}).encode() + b"\n")
        state = {
            "batches": self.batches,
            "samples": len(self._offsets) - 1,
            "bytes": self._sizes,
            "checksums": self._sums,
            "offsets": sums["offsets"],
            "target_width": self.target_width,
            "objective": self.objective,
        }
        replace_file(self._progress, json.dumps(state).encode())

    def close(self) -> None:
        """Close the files; all that counts has been written by `checkpoint`."""
        for file in self._files:
            with suppress(OSError):
                file.close()


def bytes_of(tensor: Tensor) -> bytes:
    """The bits of a tensor, in order."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def checksum(file: Path, size: int | None = None) -> int:
    """CRC-32 of a file, or of its first `size` bytes.

    Raises:
        ValueError: if it has fewer.
    """
    total, left = 0, size
    with file.open("rb") as stream:
        while left is None or left > 0:
            block = stream.read(_BLOCK if left is None else min(_BLOCK, left))
            if not block:
                break
            total = zlib.crc32(block, total)
            left = None if left is None else left - len(block)
    if left:
        raise damaged(file, f"lacks {left} of {size} bytes")
    return total


def read_offsets(file: Path, form: int | None) -> tuple[np.ndarray, dict[str, Any]]:
    """The offsets of a shard, and what stands behind them: nothing in format 1.

    Raises:
        ValueError: if the file is missing or damaged.
    """
    try:
        with file.open("rb") as stream:
            offsets = np.load(stream, allow_pickle=False)
            rest = stream.read()
        sums = json.loads(rest) if rest or form == FORMAT else {}
        if not isinstance(sums, dict):
            raise ValueError("no checksums")
    except FileNotFoundError:
        raise damaged(file, "is missing") from None
    except (ValueError, EOFError, SyntaxError, TypeError, KeyError, MemoryError, OverflowError) as error:
        raise damaged(file, f"cannot be read ({error})") from None
    return offsets, sums


def check_offsets(file: Path, offsets: np.ndarray) -> None:
    """Raise a `ValueError` unless these are numbers of rows that add up."""
    if offsets.ndim != 1 or offsets.dtype != np.int64 or not len(offsets):
        raise damaged(file, f"holds {offsets.dtype} {offsets.shape} in place of int64 [samples + 1]")
    if offsets[0] != 0 or (np.diff(offsets) < 0).any():
        raise damaged(file, "holds offsets that do not begin at 0 and rise")
