"""Features of a frozen model on disk, for shortcuts on the module that ends it.

What a terminal shortcut sees never changes while it trains: the frozen model needs to run once, and every further
epoch costs the shortcut and its base module alone. One row per label is stored, `2 x in_features` bytes each in bf16;
padding and ignored labels are left out. Logits are not stored: a row of them is some 60 times larger.

A cache is a folder: `stamp.json` says what it was made from, each process has written one set of `features`, `targets`
and `offsets` files. It is built next to its place under another name and renamed when complete.
"""

import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler
from tqdm.auto import tqdm
from transformers import default_data_collator

from .._version import __version__
from ..core.distributed import barrier, from_main, gather_objects, raise_together, rank_and_world
from ..labels import Objective, Rows
from ..tuner.layer import LRegLayer
from .cached_forward import accept_features
from .output_shortcut import Terminal, find_terminal, trained_elsewhere

FORMAT = 1
_STAMP, _PROGRESS = "stamp.json", "progress-{}.json"
_DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
# What is compared on opening, and how a difference is explained.
_REASONS = {
    "format": "it was written by another version of lreg_peft",
    "weights": "the weights below the shortcut are not those it was made with",
    "model_dtype": "the model has another dtype",
    "attention": "the model uses another attention implementation",
    "module": "the shortcut is on another module",
    "data": "the data are not those it was made from, or come in another order",
    "dtype": "it was stored in another dtype",
}
_SECONDS_BETWEEN_CHECKPOINTS = 10.0


class FeatureCache(Dataset):
    """Stored features, memory-mapped: item i holds the rows of sample i as `{"features", "labels"}`.

    Made by `cache_features`. `len(cache)` is the number of samples, `n_rows` that of rows. With `collate` as the
    collator, a batch of samples gives the loss that the model itself has on them.

    Args:
        path: the folder.

    Raises:
        FileNotFoundError: if there is no complete cache.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not (self.path / _STAMP).is_file():
            raise FileNotFoundError(f"there is no complete feature cache at {self.path}: build it with cache_features.")
        self.stamp: dict[str, Any] = json.loads((self.path / _STAMP).read_text(encoding="utf-8"))
        #: "cross_entropy", "binary_cross_entropy" or "squared_error".
        self.objective: Objective = self.stamp["objective"]
        width, target_width = self.stamp["in_features"], self.stamp["target_width"]
        self._features, self._targets, self._offsets = [], [], []
        for shard in range(self.stamp["shards"]):
            offsets = np.load(self.path / f"offsets-{shard}.npy")
            self._offsets.append(offsets)
            self._features.append(self._map(f"features-{shard}.bin", self.stamp["dtype"], offsets[-1], width))
            kind = "float32" if target_width else "int64"
            self._targets.append(self._map(f"targets-{shard}.bin", kind, offsets[-1], target_width))
        self._first = np.cumsum([0, *(len(offsets) - 1 for offsets in self._offsets)])
        self.n_rows = int(sum(offsets[-1] for offsets in self._offsets))

    def __len__(self) -> int:
        return int(self._first[-1])

    @property
    def total_dataset_length(self) -> int:
        """What accelerate cuts the last batch of an evaluation to, by the number of samples; 0: not at all.

        Where samples have several rows, it would cut rows.
        """
        return len(self) if self.n_rows == len(self) else 0

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Rows of one sample: features `[rows, in_features]`, labels `[rows]` or `[rows, out_features]`."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"the cache has {len(self)} samples, got index {index}.")
        index %= len(self)
        shard = int(np.searchsorted(self._first, index, side="right")) - 1
        start, stop = self._offsets[shard][index - self._first[shard] :][:2].tolist()
        return {"features": self._features[shard][start:stop], "labels": self._targets[shard][start:stop]}

    @staticmethod
    def collate(samples: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Put the rows of several samples one under another; samples of another data set become a batch as usual."""
        if samples and "features" not in samples[0]:  # of an evaluation set that was not cached
            return default_data_collator(list(samples))  # type: ignore[no-any-return]
        return {name: torch.cat([sample[name] for sample in samples]) for name in ("features", "labels")}

    def chunks(self, rows_per_chunk: int = 4096) -> Iterator[Rows]:
        """All rows in order, in pieces; targets that are not classes are fp32."""
        if rows_per_chunk < 1:
            raise ValueError(f"rows_per_chunk must be at least 1, got {rows_per_chunk}.")
        for features, targets in zip(self._features, self._targets, strict=True):
            yield from map(Rows, features.split(rows_per_chunk), targets.split(rows_per_chunk))

    def __repr__(self) -> str:
        return f"FeatureCache({str(self.path)!r}, samples={len(self)}, rows={self.n_rows}, dtype={self.stamp['dtype']})"

    def _map(self, name: str, dtype: str, rows: int, width: int) -> Tensor:
        """`[rows, width]`, or `[rows]` for width 0, over the file; nothing is read yet, nothing can be written."""
        kind = getattr(torch, dtype)
        size = int(rows) * max(width, 1) * kind.itemsize
        file = self.path / name
        if file.stat().st_size != size:
            raise ValueError(
                f"the feature cache is damaged: {file} has {file.stat().st_size} bytes in place of {size}."
            )
        if not size:
            return torch.empty((0, width) if width else (0,), dtype=kind)
        # Copy on write: torch wants memory that may be written to, the file must not change.
        flat = torch.from_numpy(np.memmap(file, dtype=np.uint8, mode="c")).view(kind)
        return flat.view(-1, width) if width else flat


def cache_features(
    model: nn.Module,
    data: Iterable[Any],
    path: str | Path,
    *,
    adapter_name: str | None = None,
    batch_size: int | None = 8,
    collate_fn: Callable[[list[Any]], Mapping[str, Any]] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    overwrite: bool = False,
    show_progress: bool = True,
) -> FeatureCache:
    """Run the frozen part of a model once over data, and keep what its terminal shortcut sees.

    If `path` holds a complete cache of the same model and data, it is opened; an interrupted one is finished. The
    model is prepared to be called with `features=` and `labels=`, so that a `Trainer` takes the cache as its data:

        cache = cache_features(model, train_dataset, "features")
        Trainer(model, args, train_dataset=cache, data_collator=cache.collate).train()

    The loss is the mean over the labels that are predicted. (Without a cache, Trainer also counts the first label of
    every text, which a causal language model never predicts, so its figure is smaller by one part in the length.)

    Features are computed in eval mode. Training with dropout in the backbone (`backbone_eval=False`) sees other ones
    at every step: that is another regularisation.

    Several processes share the work: they call this function together; of a data set each takes a part, and a data
    loader must give each process its own.

    Args:
        model: a model whose LReg adapter is on its output module, and on nothing else, with a frozen rest.
        data: a data set of samples (dictionaries with labels; also an iterable one, of which each process gives its own
            part), or a data loader or other iterable of batches that gives the same ones in the same order every time.
        path: folder of the cache.
        adapter_name: the adapter to train; None takes the active one.
        batch_size: samples of a data set per forward pass; None if the items of `data` are batches already.
        collate_fn: makes a batch from samples; None takes `transformers.default_data_collator`, which wants samples of
            equal length.
        dtype: of the stored features: bf16, fp16 or fp32.
        overwrite: replace a cache that does not fit in place of refusing.
        show_progress: show a progress bar on the main process.

    Returns:
        The cache, opened.

    Raises:
        ValueError: if the adapter is not terminal or something else trains; if the data give no rows or come in a
            random order; or if there is a cache of another model or other data, with the difference.
        OSError: if the disk is full or cannot be written; nothing is left behind.
        RuntimeError: if another process stopped with an error.
    """
    path = Path(path)
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, _DTYPES))}, got {dtype}.")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    terminal = find_terminal(model, adapter_name)
    if other := trained_elsewhere(terminal):
        raise ValueError(
            f"{other[0]!r} and {len(other) - 1} more parameters outside the shortcut at {terminal.name!r} require "
            "gradients: stored features would be out of date after the first step. Freeze them, or do without a cache."
        )
    rank, world = rank_and_world()
    batches = _Batches(data, batch_size, collate_fn, rank, world)
    bar = show_progress and rank == 0
    stamp = {
        "format": FORMAT,
        "weights": _fingerprint_weights(terminal),
        "model_dtype": str(next(terminal.model.parameters()).dtype),
        "attention": getattr(getattr(terminal.model, "config", None), "_attn_implementation", None),
        "module": terminal.name,
        "data": gather_objects(batches.fingerprint(bar)),
        "dtype": _DTYPES[dtype],
        "in_features": terminal.layer.in_features,
        "shards": world,
        "versions": {"lreg_peft": __version__, "torch": torch.__version__},
    }
    if from_main((path / _STAMP).is_file()):
        differences = _differences(path, stamp)
        if not differences:
            return _opened(path, terminal)
        if not overwrite:
            raise ValueError(
                f"the feature cache at {path} does not fit: {'; '.join(differences)}. Give another path, or "
                "overwrite=True."
            )
    elif from_main(path.exists() and any(path.iterdir())) and not overwrite:
        raise ValueError(f"{path} exists and is not a feature cache. Give another path, or overwrite=True.")
    _build(terminal, batches, path, stamp, dtype, rank, bar)
    return _opened(path, terminal)


def _opened(path: Path, terminal: Terminal) -> FeatureCache:
    """The cache, with the model prepared for it."""
    cache = FeatureCache(path)
    accept_features(terminal, cache.objective)
    return cache


class _Batches:
    """This process's part of the data, as batches."""

    def __init__(
        self,
        data: Iterable[Any],
        batch_size: int | None,
        collate_fn: Callable[[list[Any]], Mapping[str, Any]] | None,
        rank: int,
        world: int,
    ) -> None:
        samplers = (getattr(data, "sampler", None), getattr(getattr(data, "batch_sampler", None), "sampler", None))
        if isinstance(data, DataLoader) and any(isinstance(sampler, RandomSampler) for sampler in samplers):
            raise ValueError("the data loader shuffles: give the data set, or a loader with shuffle=False.")
        if isinstance(data, Iterator):
            raise ValueError(
                f"data must be something that can be iterated over twice, got a {type(data).__name__}, which is used "
                "up by one pass."
            )
        self._data: Any = data
        self._collate = collate_fn or default_data_collator
        self._batch_size = batch_size
        self._samples: range | None = None
        streams = _is_stream(data)
        self._streams_samples = streams and batch_size is not None
        gives_batches = batch_size is None or isinstance(data, DataLoader) or not hasattr(data, "__getitem__")
        if isinstance(data, Sized) and not gives_batches and not streams:
            length = len(data)
            share = -(-length // world)
            self._samples = range(min(rank * share, length), min((rank + 1) * share, length))

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        if self._streams_samples and self._batch_size is not None:
            samples = iter(self._data)
            while batch := list(islice(samples, self._batch_size)):
                yield self._collate(batch)
            return
        if self._samples is None or self._batch_size is None:
            yield from self._data
            return
        for start in range(0, len(self._samples), self._batch_size):
            yield self._collate([self._data[i] for i in self._samples[start : start + self._batch_size]])

    def total(self) -> int | None:
        """Number of batches, if known."""
        if self._samples is not None and self._batch_size is not None:
            return -(-len(self._samples) // self._batch_size)
        return len(self._data) if isinstance(self._data, Sized) else None

    def fingerprint(self, show_progress: bool) -> str:
        """Of the contents of all inputs and labels of this process, in order."""
        digest = hashlib.blake2b(digest_size=16)
        for batch in tqdm(self, total=self.total(), desc="feature cache: data", disable=not show_progress):
            _digest_batch(digest, batch)
        return digest.hexdigest()


def _is_stream(data: Any) -> bool:
    """Whether `data` is a data set of samples that can only be gone through, of torch or of `datasets`."""
    kinds = (f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(data).__mro__)
    return isinstance(data, IterableDataset) or "datasets.IterableDataset" in kinds


def _digest_batch(digest: Any, batch: Any) -> None:
    if not isinstance(batch, Mapping):
        raise TypeError(f"a batch must be a dictionary of model inputs with labels, got {type(batch).__name__}.")
    for name in sorted(batch):
        value = batch[name]
        digest.update(name.encode())
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            digest.update(_bytes(value))
        else:
            digest.update(repr(value).encode())


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _fingerprint_weights(terminal: Terminal) -> str:
    """Of every parameter and buffer below the terminal module; sums of bit patterns do not depend on their order."""
    digest = hashlib.blake2b(digest_size=16)
    for name, layer in terminal.model.named_modules():
        if isinstance(layer, LRegLayer) and layer is not terminal.layer:  # shortcuts below that are switched on
            digest.update(f"{name}{[] if layer.disable_adapters else layer.stacked_adapters}".encode())
    for name, tensor in terminal.model.state_dict().items():
        if name.startswith(f"{terminal.name}."):
            continue
        flat = tensor.detach().contiguous().reshape(-1)
        kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
        bits = flat.view(kinds[flat.element_size()])
        weights = torch.arange(1, 1 + min(len(bits), 4096), device=bits.device)  # a permutation would not show in a sum
        sums = bits.sum(dtype=torch.int64), (bits[: len(weights)] * weights).sum(dtype=torch.int64)
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}{[int(value) for value in sums]}".encode())
    return digest.hexdigest()


def _differences(path: Path, stamp: Mapping[str, Any]) -> list[str]:
    try:
        found = json.loads((path / _STAMP).read_text(encoding="utf-8"))
    except ValueError:
        return ["its stamp.json is damaged"]
    return [reason for name, reason in _REASONS.items() if found.get(name) != stamp[name]]


def _build(
    terminal: Terminal,
    batches: _Batches,
    path: Path,
    stamp: dict[str, Any],
    dtype: torch.dtype,
    rank: int,
    show_progress: bool,
) -> None:
    partial = path.with_name(path.name + ".partial")
    if rank == 0:
        if partial.exists() and _differences(partial, stamp):
            shutil.rmtree(partial)  # of another attempt
        partial.mkdir(parents=True, exist_ok=True)
        (partial / _STAMP).write_text(json.dumps(stamp), encoding="utf-8")
    barrier()
    error: Exception | None = None
    same_data = True
    written: _Shard | None = None
    try:
        written = _Shard(partial, rank, dtype)
        same_data = _fill(terminal, batches, written, show_progress) == stamp["data"][rank]
    except OSError as raised:
        advice = ""
        if raised.errno == errno.ENOSPC:
            advice = f" A row takes {terminal.layer.in_features * dtype.itemsize} bytes: free space, or store less."
        error = OSError(
            raised.errno,
            f"the feature cache could not be written to {path}: {raised}. Nothing was left behind.{advice}",
        )
    except Exception as raised:
        error = raised  # of the model: what was written stays, to go on from
    finally:
        if written is not None:
            written.close()
    if any(gather_objects(isinstance(error, OSError))) and rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
    raise_together(error)
    assert written is not None
    shapes = gather_objects((written.rows, written.target_width, written.objective))
    reason = None
    if not all(gather_objects(same_data)):
        reason = (
            "the data came in another order, or changed, between two passes: a cache needs the same ones every time."
        )
    elif not sum(rows for rows, _, _ in shapes):
        reason = "the data gave no rows: there are no batches, or all their labels are ignored (-100)."
    if reason:
        if rank == 0:
            shutil.rmtree(partial)
        raise ValueError(reason)
    if rank == 0:
        widths = [(width, objective) for rows, width, objective in shapes if rows]
        stamp = {**stamp, "target_width": widths[0][0], "objective": widths[0][1]}
        (partial / _STAMP).write_text(json.dumps(stamp, indent=1), encoding="utf-8")
        for leftover in partial.glob("progress-*"):
            leftover.unlink()
        if path.exists():
            shutil.rmtree(path)
        os.replace(partial, path)
    barrier()


def _fill(terminal: Terminal, batches: _Batches, shard: "_Shard", show_progress: bool) -> str:
    """Write what is missing; returns the fingerprint of the data as they came this time."""
    digest = hashlib.blake2b(digest_size=16)
    bar = tqdm(batches, total=batches.total(), desc="feature cache: rows", disable=not show_progress)
    saved = time.monotonic()
    for number, batch in enumerate(bar):
        _digest_batch(digest, batch)
        if number < shard.batches:
            continue  # done before an interruption
        if shard.objective is None:
            shard.objective = terminal.check(batch)
        shard.append(*_rows_by_sample(terminal, batch))
        if time.monotonic() - saved > _SECONDS_BETWEEN_CHECKPOINTS:
            shard.checkpoint()
            saved = time.monotonic()
    shard.checkpoint()
    return digest.hexdigest()


def _rows_by_sample(terminal: Terminal, batch: Mapping[str, Any]) -> tuple[Rows, list[int]]:
    """Rows of a batch and how many each of its samples has."""
    rows, labels = terminal.rows(batch), batch["labels"]
    if rows.targets.is_floating_point() or labels.ndim != 2:
        return rows, [1] * len(rows.targets)
    return rows, terminal.rows_per_sample(labels)


class _Shard:
    """The files of one process, which grow batch by batch and know where they may go on."""

    def __init__(self, folder: Path, rank: int, dtype: torch.dtype) -> None:
        self._progress = folder / _PROGRESS.format(rank)
        self._offsets_file = folder / f"offsets-{rank}.npy"
        self._dtype = dtype
        self.batches = self.rows = self.target_width = 0
        self.objective: str | None = None
        self._offsets = [0]
        names = [folder / f"{kind}-{rank}.bin" for kind in ("features", "targets")]
        sizes = [0, 0]
        if self._progress.is_file() and self._offsets_file.is_file():
            state = json.loads(self._progress.read_text(encoding="utf-8"))
            self.batches, self.target_width, self.objective = (
                state["batches"],
                state["target_width"],
                state["objective"],
            )
            self._offsets = np.load(self._offsets_file)[: state["samples"] + 1].tolist()
            self.rows, sizes = self._offsets[-1], state["bytes"]
        self._files = []
        for name, size in zip(names, sizes, strict=True):
            file = name.open("r+b" if name.exists() else "w+b")
            file.truncate(size)
            file.seek(size)
            self._files.append(file)

    def append(self, rows: Rows, counts: list[int]) -> None:
        """Write one batch, `counts` rows for each of its samples."""
        self._files[0].write(_bytes(rows.features.to(self._dtype)))
        if rows.targets.is_floating_point():
            self.target_width = rows.targets.shape[1]
            self._files[1].write(_bytes(rows.targets.float()))
        else:
            self._files[1].write(_bytes(rows.targets))
        for count in counts:
            self._offsets.append(self._offsets[-1] + count)
        self.rows = self._offsets[-1]
        self.batches += 1

    def checkpoint(self) -> None:
        """Make sure that what was written so far survives."""
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())
        np.save(self._offsets_file, np.asarray(self._offsets, dtype=np.int64))
        state = {
            "batches": self.batches,
            "samples": len(self._offsets) - 1,
            "bytes": [file.tell() for file in self._files],
            "target_width": self.target_width,
            "objective": self.objective,
        }
        temporary = self._progress.with_suffix(".new")
        temporary.write_text(json.dumps(state), encoding="utf-8")
        os.replace(temporary, self._progress)

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            file.close()
