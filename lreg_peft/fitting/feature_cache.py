"""Features of a frozen model on disk, for shortcuts on the module that ends it.

What a terminal shortcut sees never changes while it trains: the frozen model needs to run once, and every further
epoch costs the shortcut and its base module alone. One row per label is stored, `2 x in_features` bytes each in bf16;
padding and ignored labels are left out. Logits are not stored: a row of them is some 60 times larger.

A cache is a folder; `cache_files` says what is in it, and how it is written.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import closing
from itertools import islice
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler
from tqdm.auto import tqdm
from transformers import default_data_collator

from .._version import __version__
from ..core.checks import checked, whole
from ..core.distributed import (
    from_main,
    gather_objects,
    rank_and_world,
    require_equal,
    require_equal_models,
    together,
)
from ..core.fingerprint import fingerprint_of_all
from ..labels import LossKind, Rows
from ..tuner.layer import LRegLayer
from .cache_files import (
    DTYPES,
    FORMAT,
    Building,
    WriteError,
    bytes_of,
    check_offsets,
    check_stamp,
    checksum,
    damaged,
    foreign_files,
    move_away,
    read_offsets,
    read_stamp,
    replace_file,
    tidy,
    writing,
)
from .cache_files import STAMP as _STAMP
from .cache_files import Shard as _Shard
from .cached_forward import accept_features
from .coefficients import check_yes_or_no
from .output_shortcut import Terminal, find_terminal, trained_elsewhere

# What is compared on opening, and how a difference is explained.
_OF_MODEL = {
    "weights": "the weights below the shortcut are not those it was made with",
    "model_dtype": "the model has another dtype",
    "attention": "the model uses another attention implementation",
    "module": "the shortcut is on another module",
    "in_features": "the module takes another number of features",
}
_REASONS = {
    "format": "it was written by another version of lreg_peft",
    **_OF_MODEL,
    "data": "the data are not those it was made from, or come in another order",
    "dtype": "it was stored in another dtype",
}
_SECONDS_BETWEEN_CHECKPOINTS = 10.0
_LARGE = 1 << 28  # bytes whose reading is worth a progress bar


class FeatureCache(Dataset):
    """Stored features, memory-mapped: item i holds the rows of sample i as `{"features", "labels"}`.

    Made by `cache_features`. `len(cache)` is the number of samples, `n_rows` that of rows. With `collate` as the
    collator, a batch of samples gives the loss that the model itself has on them.

    Args:
        path: the folder.
        verify: read everything once and compare checksums. Without it only sizes are compared.
        show_progress: show a progress bar while a large cache is read.

    Raises:
        FileNotFoundError: if there is no complete cache.
        ValueError: if it is damaged; names the file.
    """

    @checked()
    def __init__(self, path: str | Path, *, verify: bool = True, show_progress: bool = True) -> None:
        self.path = Path(path)
        stamp = read_stamp(self.path)
        if stamp is None:
            raise FileNotFoundError(f"there is no complete feature cache at {self.path}: build it with cache_features.")
        check_stamp(self.path, stamp)
        self.stamp: dict[str, Any] = stamp
        #: "cross_entropy", "binary_cross_entropy" or "squared_error".
        self.objective: LossKind = stamp["objective"]
        width, target_width = stamp["in_features"], stamp["target_width"]
        self._features, self._targets, self._offsets = [], [], []
        sums = []
        for shard in range(stamp["shards"]):
            file = self.path / f"offsets-{shard}.npy"
            offsets, written = read_offsets(file, stamp["format"])
            check_offsets(file, offsets)
            self._offsets.append(offsets)
            self._features.append(self._map(f"features-{shard}.bin", stamp["dtype"], offsets[-1], width))
            kind = "float32" if target_width else "int64"
            self._targets.append(self._map(f"targets-{shard}.bin", kind, offsets[-1], target_width))
            sums.append(written)
        if (beyond := self.path / f"offsets-{stamp['shards']}.npy").exists():
            raise damaged(beyond, f"is one shard more than {_STAMP} counts")
        if stamp["format"] >= 2:
            for shard, written in enumerate(sums):
                self._compare(shard, written, self._offsets[shard])
            if verify:
                self._verify(sums, show_progress)
        self._first = np.cumsum([0, *(len(offsets) - 1 for offsets in self._offsets)])
        self.n_rows = int(sum(offsets[-1] for offsets in self._offsets))

    def _compare(self, shard: int, written: Mapping[str, Any], offsets: np.ndarray) -> None:
        """The offsets file against itself and the stamp; a shard without rows does not know its targets' width."""
        file = self.path / f"offsets-{shard}.npy"
        if written.get("offsets") != checksum_of(offsets):
            raise damaged(file, "does not have the checksum it was written with")
        for name in ("dtype", "in_features", "target_width") if offsets[-1] else ("dtype", "in_features"):
            if written.get(name) != self.stamp[name]:
                raise damaged(self.path / _STAMP, f"gives {name}={self.stamp[name]!r}, and {file.name} another")

    def _verify(self, sums: list[dict[str, Any]], show_progress: bool) -> None:
        files = [
            (self.path / f"{kind}-{shard}.bin", written.get(kind))
            for shard, written in enumerate(sums)
            for kind in ("features", "targets")
        ]
        large = sum(file.stat().st_size for file, _ in files) > _LARGE
        for file, expected in tqdm(files, desc="feature cache: checksums", disable=not (show_progress and large)):
            if checksum(file) != expected:
                raise damaged(file, "does not have the checksum it was written with")

    def check_belongs_to(self, terminal: Terminal) -> None:
        """Raise a `ValueError` with the reason unless the rows are what this shortcut sees.

        Args:
            terminal: the shortcut, from `find_terminal`.
        """
        differences = _differences(self.stamp, _stamp_of_model(terminal, self.stamp["format"]), _OF_MODEL)
        if not differences and self.n_rows:
            objective = terminal.loss_kind(next(targets for targets in self._targets if len(targets))[:1])
            if objective != self.objective:
                differences = [f"it was made for {self.objective}, and the model minimises {objective}"]
        if differences:
            raise ValueError(
                f"the feature cache at {self.path} does not belong to this model: {'; '.join(differences)}. Make one "
                "with cache_features(model, ...)."
            )

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
        if not isinstance(index, (int, np.integer)):
            raise TypeError(f"index must be a whole number, got {index!r}.")
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

    @checked(rows_per_chunk=whole(1))
    def chunks(self, rows_per_chunk: int = 4096) -> Iterator[Rows]:
        """All rows in order, in pieces; targets that are not classes are fp32."""
        for features, targets in zip(self._features, self._targets, strict=True):
            yield from map(Rows, features.split(rows_per_chunk), targets.split(rows_per_chunk))

    def __repr__(self) -> str:
        return f"FeatureCache({str(self.path)!r}, samples={len(self)}, rows={self.n_rows}, dtype={self.stamp['dtype']})"

    def _map(self, name: str, dtype: str, rows: int, width: int) -> Tensor:
        """`[rows, width]`, or `[rows]` for width 0, over the file; nothing is read yet, nothing can be written."""
        kind = getattr(torch, dtype)
        size = int(rows) * max(width, 1) * kind.itemsize
        file = self.path / name
        if not file.is_file():
            raise damaged(file, "is missing")
        if file.stat().st_size != size:
            raise damaged(file, f"has {file.stat().st_size} bytes in place of {size}")
        if not size:
            return torch.empty((0, width) if width else (0,), dtype=kind, device="cpu")
        # Copy on write: torch wants memory that may be written to, the file must not change.
        flat = torch.from_numpy(np.memmap(file, dtype=np.uint8, mode="c")).view(kind)
        return flat.view(-1, width) if width else flat


def checksum_of(offsets: np.ndarray) -> int:
    """As the offsets file has it."""
    return zlib.crc32(offsets.tobytes())


@checked(stage=together, batch_size=whole(1))
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

    If `path` holds a complete cache of the same model and data, it is opened; an interrupted one is finished from its
    last checkpoint (there is one every ten seconds), whatever the interruption was. Two jobs on one path do not disturb
    each other: each builds in a folder of its own, and the first to finish provides the cache. The model is prepared to
    be called with `features=` and `labels=`, so that a `Trainer` takes the cache as its data:

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
        path: folder of the cache, or a link to one.
        adapter_name: the adapter to train; None takes the active one.
        batch_size: samples of a data set per forward pass; None if the items of `data` are batches already.
        collate_fn: makes a batch from samples; None takes `transformers.default_data_collator`, which wants samples of
            equal length.
        dtype: of the stored features: bf16, fp16 or fp32.
        overwrite: replace a cache that does not fit in place of refusing. Nothing is deleted that a cache has not
            written: a folder with other files in it is refused all the same.
        show_progress: show a progress bar on the main process.

    Returns:
        The cache, opened.

    Raises:
        ValueError: if the adapter is not terminal or something else trains; if the data give no rows, or come in a
            random order; if a feature is not finite, or not in `dtype`; if a label is out of range; if there is a
            cache of another model or other data, with the difference; or if processes differ in model or options.
        OSError: if the disk is full or cannot be written; nothing is left behind.

        What one process raises, all raise. The model is then as it was.
    """
    given = path
    with together():
        path = Path(os.path.realpath(path))  # what a link points to: the folder is renamed into its place
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype}.")
        terminal = find_terminal(model, adapter_name)
        if other := trained_elsewhere(terminal):
            raise ValueError(
                f"{other[0]!r} and {len(other) - 1} more parameters outside the shortcut at {terminal.name!r} require "
                "gradients: stored features would be out of date after the first step. Freeze them, or do without a "
                "cache."
            )
        rank, world = rank_and_world()
        batches = _Batches(data, batch_size, collate_fn, rank, world)
    options = {"adapter_name": terminal.adapter_name, "batch_size": batch_size, "dtype": dtype, "overwrite": overwrite}
    require_equal({"path": str(given), **options}, "Give every process the same options.")
    require_equal_models(terminal.model, "Load the same weights on every process.")
    bar = show_progress and rank == 0
    with together():
        form = _format_at(path) if rank == 0 else FORMAT
    stamp = _stamp(terminal, batches, dtype, from_main(form), bar)
    fits = False
    with together():
        fits = rank == 0 and _fits(path, stamp, overwrite, bar)
    fits = from_main(fits)
    if not fits:
        if stamp["format"] != FORMAT:
            stamp = _stamp(terminal, batches, dtype, FORMAT, bar)
        _build(terminal, batches, path, stamp, dtype, rank, bar, overwrite)
    with together():
        cache = FeatureCache(path, verify=False)  # just built, or verified by the main process
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

    def fingerprint(self, form: int, show_progress: bool) -> str:
        """Of the contents of all inputs and labels of this process, in order."""
        digest = hashlib.blake2b(digest_size=16)
        for batch in tqdm(self, total=self.total(), desc="feature cache: data", disable=not show_progress):
            _digest_batch(digest, batch, form)
        return digest.hexdigest()


def _is_stream(data: Any) -> bool:
    """Whether `data` is a data set of samples that can only be gone through, of torch or of `datasets`."""
    kinds = (f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(data).__mro__)
    return isinstance(data, IterableDataset) or "datasets.IterableDataset" in kinds


def _digest_batch(digest: Any, batch: Any, form: int = FORMAT) -> None:
    if not isinstance(batch, Mapping):
        raise TypeError(f"a batch must be a dictionary of model inputs with labels, got {type(batch).__name__}.")
    for name in sorted(batch):
        value = batch[name]
        digest.update(str(name).encode())
        if isinstance(value, np.ndarray) and form > 1 and value.dtype != object:  # its repr leaves the middle out
            value = torch.from_numpy(np.ascontiguousarray(value))
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            digest.update(bytes_of(value))
        else:
            digest.update(repr(value).encode())


def _stamp(terminal: Terminal, batches: _Batches, dtype: torch.dtype, form: int, show_progress: bool) -> dict[str, Any]:
    """What a cache of this model and these data would be stamped with, in a format; all processes take part."""
    with together():
        data = batches.fingerprint(form, show_progress)
        of_model = _stamp_of_model(terminal, form)
    return {
        "format": form,
        **of_model,
        "data": gather_objects(data),
        "dtype": DTYPES[dtype],
        "shards": rank_and_world()[1],
        "versions": {"lreg_peft": __version__, "torch": torch.__version__},
    }


def _stamp_of_model(terminal: Terminal, form: int) -> dict[str, Any]:
    return {
        "weights": _fingerprint_weights(terminal, form),
        "model_dtype": str(next(terminal.model.parameters()).dtype),
        "attention": getattr(getattr(terminal.model, "config", None), "_attn_implementation", None),
        "module": terminal.name,
        "in_features": terminal.layer.in_features,
    }


def _fingerprint_weights(terminal: Terminal, form: int = FORMAT) -> str:
    """Of every parameter and buffer below the terminal module, and of which adapters there are switched on."""
    digest = hashlib.blake2b(digest_size=16)
    for name, layer in terminal.model.named_modules():
        if layer is terminal.layer:
            continue
        if isinstance(layer, LRegLayer):
            digest.update(f"{name}{[] if layer.disable_adapters else layer.stacked_adapters}".encode())
        elif isinstance(layer, BaseTunerLayer) and form > 1:
            digest.update(f"{name}{[] if layer.disable_adapters else layer.active_adapters}".encode())
    tensors = [
        (name, tensor)
        for name, tensor in terminal.model.state_dict().items()
        if not name.startswith(f"{terminal.name}.")
    ]
    if form > 1:
        digest.update(fingerprint_of_all(tensors).encode())
        return digest.hexdigest()
    for name, tensor in tensors:  # what caches of the first format are stamped with
        flat = tensor.detach().contiguous().reshape(-1)
        kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
        bits = flat.view(kinds[flat.element_size()])
        weights = torch.arange(1, 1 + min(len(bits), 4096), device=bits.device)
        sums = bits.sum(dtype=torch.int64), (bits[: len(weights)] * weights).sum(dtype=torch.int64)
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}{[int(value) for value in sums]}".encode())
    return digest.hexdigest()


def _format_at(path: Path) -> int:
    """In which format to compare with what is there; the present one if nothing is, or nothing that can be read."""
    try:
        found = read_stamp(path)
    except ValueError:
        return FORMAT
    return 1 if found is not None and found.get("format") == 1 else FORMAT


def _differences(found: Mapping[str, Any], expected: Mapping[str, Any], reasons: Mapping[str, str]) -> list[str]:
    return [reason for name, reason in reasons.items() if name in expected and found.get(name) != expected[name]]


def _fits(path: Path, stamp: Mapping[str, Any], overwrite: bool, show_progress: bool) -> bool:
    """Whether the cache at `path` is the one that is asked for; False if one is to be built there.

    Raises:
        ValueError: if `path` holds what must not be replaced.
    """
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} exists and is not a feature cache but a file. Give another path.")
    if not path.exists() or not any(path.iterdir()):
        if os.path.ismount(path):
            raise ValueError(
                f"{path} is a mount point, which cannot be replaced by a finished cache. Give a path in it."
            )
        return False
    foreign = foreign_files(path)
    found: dict[str, Any] | None = None
    try:
        found = read_stamp(path)
        if found is None and foreign:
            raise ValueError(
                f"{path} exists and is not a feature cache: it holds {foreign[0]!r}, which no cache writes. Give "
                "another path; overwrite=True deletes nothing but caches."
            )
        if found is None:
            raise ValueError(
                f"{path} exists and is not a feature cache, though it holds parts of one. Give another path, or "
                "overwrite=True."
            )
        check_stamp(path, found)
        differences = _differences(found, stamp, _REASONS)
        if not differences:
            FeatureCache(path, show_progress=show_progress)  # raises if it is damaged
            tidy(path)
            return True
        reason = f"the feature cache at {path} does not fit: {'; '.join(differences)}."
    except ValueError as error:
        if found is None and foreign:
            raise
        if not overwrite:
            raise
        reason = str(error)
    if not overwrite:
        raise ValueError(f"{reason} Give another path, or overwrite=True.")
    if foreign:
        raise ValueError(
            f"{reason} It cannot be overwritten, since {path} also holds {foreign[0]!r}, which no cache writes. Move "
            "that, or give another path."
        )
    return False


def _build(
    terminal: Terminal,
    batches: _Batches,
    path: Path,
    stamp: dict[str, Any],
    dtype: torch.dtype,
    rank: int,
    show_progress: bool,
    overwrite: bool,
) -> None:
    building: Building | None = None
    row = terminal.layer.in_features * dtype.itemsize
    try:
        with together(), writing(path, row):
            if rank == 0:
                building = Building.begin(path, stamp, _REASONS)
        folder = Path(from_main("" if building is None else str(building.folder)))
        shape: tuple[int, int, str | None] = (0, 0, None)
        same_data = True
        try:
            with together():
                with writing(path, row):
                    shard = _Shard(folder, rank, dtype, terminal.layer.in_features)
                with closing(shard):
                    same_data = _fill(terminal, batches, shard, show_progress, path) == stamp["data"][rank]
                shape = shard.rows, shard.target_width, shard.objective
        except WriteError:
            if building is not None:
                building.discard()
            raise
        shapes = gather_objects(shape)
        kinds = {(width, objective) for rows, width, objective in shapes if rows}
        reason = None
        if not all(gather_objects(same_data)):
            reason = (
                "the data came in another order, or changed, between two passes: a cache needs the same ones every "
                "time."
            )
        elif not kinds:
            reason = "the data gave no rows: there are no batches, or all their labels are ignored (-100)."
        elif len(kinds) > 1:
            reason = f"the labels must be all of one kind, but processes have {sorted(kinds)}."
        with together(), writing(path, row):
            if building is not None and reason is not None:
                building.discard()
            elif building is not None:
                ((width, objective),) = kinds
                stamp = {**stamp, "target_width": width, "objective": objective}
                replace_file(building.folder / _STAMP, json.dumps(stamp, indent=1).encode())
                _put_in_place(building, path, stamp, overwrite)
        if reason is not None:
            raise ValueError(reason)
    finally:
        if building is not None:
            building.release()


def _put_in_place(building: Building, path: Path, stamp: Mapping[str, Any], overwrite: bool) -> None:
    while not building.put_in_place():
        if _fits(path, stamp, overwrite, False):  # another job was faster
            building.discard()
            return
        move_away(path)


def _fill(terminal: Terminal, batches: _Batches, shard: _Shard, show_progress: bool, path: Path) -> str:
    """Write what is missing; returns the fingerprint of the data as they came this time."""
    digest = hashlib.blake2b(digest_size=16)
    bar = tqdm(batches, total=batches.total(), desc="feature cache: rows", disable=not show_progress)
    row = terminal.layer.in_features * shard.dtype.itemsize
    saved = monotonic()
    for number, batch in enumerate(bar):
        _digest_batch(digest, batch)
        if number < shard.batches:
            continue  # done before an interruption
        rows, counts = _rows_by_sample(terminal, batch)
        objective = _objective(terminal, rows, shard, number)
        terminal.check_what_is_new(batch, rows)
        shard.objective = objective
        with writing(path, row):
            shard.append(rows, counts)
            if monotonic() - saved > _SECONDS_BETWEEN_CHECKPOINTS:
                shard.checkpoint()
                saved = monotonic()
    with writing(path, row):
        shard.checkpoint()
    return digest.hexdigest()


def _objective(terminal: Terminal, rows: Rows, shard: _Shard, number: int) -> str:
    """What the rows of a batch are for.

    Raises:
        ValueError: if they are for nothing: not finite, as they are or as they would be stored, or with labels that
            do not fit.
    """
    objective = terminal.loss_kind(rows.targets)
    check_yes_or_no(objective, rows.targets)
    if shard.objective not in (None, objective):
        raise ValueError(
            f"the labels must be all of one kind, got {shard.objective} and, in batch {number}, {objective}."
        )
    for name, tensor in (("features", rows.features), ("labels", rows.targets)):
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(
                f"the {name} of {terminal.name!r} must be finite, got NaN or infinite values in batch {number}."
            )
    if not torch.isfinite(rows.features.to(shard.dtype)).all():
        raise ValueError(
            f"the features of {terminal.name!r} reach {float(rows.features.abs().max()):.4g} in batch {number}, and "
            f"{shard.dtype} ends at {torch.finfo(shard.dtype).max:.4g}: store them with dtype=torch.bfloat16 or "
            "torch.float32."
        )
    return objective


def _rows_by_sample(terminal: Terminal, batch: Mapping[str, Any]) -> tuple[Rows, list[int]]:
    """Rows of a batch and how many each of its samples has."""
    rows, labels = terminal.rows(batch), batch["labels"]
    if rows.targets.is_floating_point() or labels.ndim != 2:
        return rows, [1] * len(rows.targets)
    return rows, terminal.rows_per_sample(labels)
