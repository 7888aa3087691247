"""Features of a frozen model on disk, for shortcuts on the module that ends it.

What such a shortcut sees never changes while it trains: the frozen model needs to run once, and every further epoch
costs the shortcut and its base module alone. One row per label is stored, `2 x in_features` bytes each in bf16; padding
and ignored labels are left out. Logits are not stored: a row of them is some 60 times larger.

A cache is a folder. `stamp.json`, written first, says what it is made from, and once it is complete how many shards
there are. `rows-<process>-<n>.safetensors` are the shards: features [rows, in_features], targets [rows] or
[rows, out_features], and offsets [samples + 1], where the rows of each sample begin and end. Every file is written
under another name and renamed. A shard names the stamp it belongs to and how many batches are done with it, so that an
interrupted build goes on after the last whole one.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, RandomSampler
from tqdm.auto import tqdm
from transformers import default_data_collator

from ..core.distributed import from_main, gather_objects, rank_and_world, require_equal, together
from ..core.fingerprint import fingerprint, fingerprint_of_all
from ..rows import BatchData, LossKind, Rows, batches_of, check_batch
from ..tuner.layer import LRegLayer
from .cached_forward import accept_features
from .output_layer import OutputLayer, find_output_layer, trained_elsewhere

FORMAT = 4
#: Bytes of features at which a shard is written: what an interruption costs at most.
SHARD_BYTES = 1 << 26
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_STAMP, _LOCK = "stamp.json", "build.lock"
# Files of a cache, also of earlier versions: nothing else in a folder is ever deleted.
_OWN = re.compile(
    r"(stamp\.json|rows-\d+-\d+\.safetensors|(features|targets)-\d+\.bin|offsets-\d+\.npy|progress-\d+\.json)(\.new)?"
)


@dataclass(frozen=True)
class Shard(Dataset):
    """Rows of consecutive samples, mapped into memory: nothing is read before it is used.

    Attributes:
        features: `[rows, in_features]`.
        targets: int64 `[rows]`, or fp32 `[rows, out_features]`.
        offsets: int64 `[samples + 1]`.
        objective: what is minimised over them; "" if no rows have come so far.
        batches: how many of its process are done with this shard.
    """

    features: Tensor
    targets: Tensor
    offsets: Tensor
    objective: str
    batches: int

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        start, stop = self.offsets[index : index + 2].tolist()
        return {"features": self.features[start:stop], "labels": self.targets[start:stop]}


class FeatureCache(ConcatDataset):
    """Stored features, memory-mapped. Item i holds the rows of sample i: features `[rows, in_features]`, and labels
    `[rows]` or `[rows, out_features]`.

    Made by `cache_features`. `len(cache)` is the number of samples, `n_rows` that of rows. With `collate` as the
    collator, a batch of samples gives the loss that the model itself has on them.

    Args:
        path: the folder.

    Raises:
        FileNotFoundError: if there is no complete cache.
        ValueError: if a shard is missing, cut off or of another cache, as its header and size show; or if another
            version of this package wrote it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        stamp = _read_stamp(self.path)
        if stamp is None or "shards" not in stamp:
            raise FileNotFoundError(f"there is no complete feature cache at {self.path}: build it with cache_features.")
        self.stamp: dict[str, Any] = stamp
        #: "cross_entropy", "binary_cross_entropy" or "squared_error".
        self.objective: LossKind = stamp["objective"]
        self._shards: list[Shard] = []
        for name in (_shard_name(rank, i) for rank, n in enumerate(stamp["shards"]) for i in range(n)):
            shard = _read_shard(self.path / name, stamp["made_from"])
            if shard is None:
                raise ValueError(
                    f"the feature cache at {self.path} is damaged: {name} is missing, cut off, or of another cache. "
                    "Build it again: cache_features(..., overwrite=True)."
                )
            self._shards.append(shard)
        super().__init__(self._shards)
        self.n_rows = sum(len(shard.targets) for shard in self._shards)

    def check_belongs_to(self, output: OutputLayer) -> None:
        """Raise a `ValueError` with the reason unless the rows are what this shortcut sees.

        Args:
            output: the shortcut, from `find_output_layer`.
        """
        targets = next(shard.targets[:1] for shard in self._shards if len(shard.targets))
        expected = {**_made_from(output), "objective": output.loss_kind(targets)}
        if differences := _differences({**self.stamp["made_from"], "objective": self.objective}, expected):
            raise ValueError(
                f"the feature cache at {self.path} does not belong to this model: {differences} differ. Make "
                "one with cache_features(model, ...)."
            )

    @property
    def total_dataset_length(self) -> int:
        """What accelerate cuts the last batch of an evaluation to, by the number of samples; 0: not at all.

        Where samples have several rows, it would cut rows.
        """
        return len(self) if self.n_rows == len(self) else 0

    @staticmethod
    def collate(samples: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Put the rows of several samples one under another; samples of another data set become a batch as usual."""
        if samples and "features" not in samples[0]:  # of an evaluation set that was not cached
            return default_data_collator(list(samples))  # type: ignore[no-any-return]
        return {name: torch.cat([sample[name] for sample in samples]) for name in ("features", "labels")}

    def chunks(self, rows_per_chunk: int = 4096) -> Iterator[Rows]:
        """All rows in order, in pieces; targets that are not classes are fp32."""
        for shard in self._shards:
            if len(shard.targets):
                yield from map(Rows, shard.features.split(rows_per_chunk), shard.targets.split(rows_per_chunk))


def cache_features(
    model: nn.Module,
    data: BatchData,
    path: str | Path,
    *,
    adapter_name: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    overwrite: bool = False,
    show_progress: bool = True,
) -> FeatureCache:
    """Run the frozen part of a model once over data, and keep what the shortcut on its output sees.

    If `path` holds a complete cache of the same model and data, it is opened; an interrupted one is finished, whatever
    the interruption was. A second job on one path waits for the first and opens what that has made. The model is
    prepared to be called with `features=` and `labels=`, so that a `Trainer` takes the cache as its data:

        cache = cache_features(model, train_dataset, "features")
        Trainer(model, args, train_dataset=cache, data_collator=cache.collate).train()

    The loss is the mean over the labels that are predicted. (Without a cache, Trainer also counts the first label of
    every text, which a causal language model never predicts, so its figure is smaller by one part in the length.)
    While the output layer of a language model trains on features, the loss is computed in chunks and `output.logits`
    is None.

    Features are computed in eval mode. Training in the model, with dropout below the shortcut, sees other ones at every
    step: that is another regularisation.

    Several processes share the work: they call this function together.

    Args:
        model: a model whose LReg adapter is on its output module, and on nothing else, with a frozen rest.
        data: a data set of samples of equal length, of which each process takes a part, or a data loader or other
            iterable of batches, dictionaries with labels, of which each gives its own. The same ones must come in the
            same order every time.
        path: folder of the cache.
        adapter_name: the adapter to train; None takes the active one.
        dtype: of the stored features: bf16, fp16 or fp32.
        overwrite: replace a complete cache that does not fit in place of refusing. (One that does not fit and was left
            unfinished is replaced anyway.) Only files that caches write are deleted.
        show_progress: show a progress bar on the main process.

    Returns:
        The cache, opened.

    Raises:
        ValueError: if the adapter is not on the output or something else trains; if the data give no rows, or come in a
            random order; if a feature is not finite, or not in `dtype`; if a label is out of range; if there is a
            cache of another model, other data or another version, with the difference; or if processes differ in model
            or options.
        OSError: if the disk is full or cannot be written; with more room, the same command goes on.
            What one process raises, all raise. The model is then as it was.
    """
    with together():
        path = Path(path).resolve()
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype}.")
        output = find_output_layer(model, adapter_name)
        if other := trained_elsewhere(output):
            raise ValueError(
                f"{other[0]!r} and {len(other) - 1} more parameters outside the shortcut at {output.name!r} require "
                "gradients: stored features would be out of date after the first step. Freeze them, or do without a "
                "cache."
            )
        if isinstance(data, DataLoader) and isinstance(data.sampler, RandomSampler):
            raise ValueError("the data loader shuffles: give the data set, or a loader with shuffle=False.")
        batches = batches_of(data, in_order=True)
    options = {"adapter_name": output.adapter_name, "dtype": dtype, "overwrite": overwrite}
    model_is = _made_from(output)
    require_equal({"path": str(path), **options, **model_is}, "Give every process the same model and options.")
    is_main = rank_and_world()[0] == 0
    bar = show_progress and is_main
    with together():
        digest = hashlib.blake2b(digest_size=16)
        for batch in tqdm(batches, desc="feature cache: data", disable=not bar):
            _add_to_digest(digest, batch)
    made_from = {**model_is, "data": gather_objects(digest.hexdigest()), "dtype": str(dtype)}
    with ExitStack() as held:
        fits = False
        with together():
            if is_main and not (fits := _fits(path, made_from, overwrite)):
                path.mkdir(parents=True, exist_ok=True)
                held.enter_context(FileLock(path / _LOCK))
                if not (fits := _fits(path, made_from, overwrite)):  # another job may have been faster
                    _begin(path, made_from)
        if not from_main(fits):
            with together():
                own = _write_shards(output, batches, path, made_from, dtype, bar)
            shards, objectives, digests = zip(*gather_objects(own), strict=True)
            with together():
                if list(digests) != made_from["data"]:
                    raise ValueError(
                        "the data came in another order, or changed, between two passes (an iterator is used up by "
                        "one): a cache needs the same ones every time."
                    )
                kinds = sorted({*objectives} - {""})
                if len(kinds) != 1:
                    found = " and ".join(kinds) or "none: there are no batches, or all labels are ignored (-100)"
                    raise ValueError(f"the data must give rows with labels of one kind, and they give {found}.")
                if is_main:
                    _write_stamp(path, made_from, shards=shards, objective=kinds[0])
    with together():
        cache = FeatureCache(path)
    accept_features(output, cache.objective)
    return cache


def _add_to_digest(digest: Any, batch: Any) -> None:
    """The contents of all inputs and labels."""
    for name in sorted(check_batch(batch)):
        value = batch[name]
        if isinstance(value, np.ndarray) and value.dtype != object:  # its repr leaves the middle out
            value = torch.from_numpy(np.ascontiguousarray(value))
        said = fingerprint(value) if isinstance(value, Tensor) else repr(value)
        digest.update(f"{name}{said}".encode())


# What a cache is made from


def _made_from(output: OutputLayer) -> dict[str, Any]:
    """The part of the model that rows depend on, by words that explain a difference."""
    return {
        "weights below the shortcut": fingerprint_below(output),
        "dtype of the model": str(next(output.model.parameters()).dtype),
        "attention implementation": getattr(getattr(output.model, "config", None), "_attn_implementation", None),
        "module": output.name,
        "in_features": output.layer.in_features,
    }


def fingerprint_below(output: OutputLayer) -> str:
    """Of every parameter and buffer below the output layer, and of which adapters there are switched on."""
    digest = hashlib.blake2b(digest_size=16)
    for name, layer in output.model.named_modules():
        if isinstance(layer, BaseTunerLayer) and layer is not output.layer:
            active = layer.stacked_adapters if isinstance(layer, LRegLayer) else layer.active_adapters
            digest.update(f"{name}{[] if layer.disable_adapters else active}".encode())
    state = output.model.state_dict().items()
    below = [(name, tensor) for name, tensor in state if not name.startswith(f"{output.name}.")]
    digest.update(fingerprint_of_all(below).encode())
    return digest.hexdigest()


def _differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    return ", ".join(name for name in expected if found.get(name) != expected[name])


def _write_stamp(folder: Path, made_from: Mapping[str, Any], **complete: Any) -> None:
    stamp = {"format": FORMAT, "made_from": made_from, **complete}
    _replace(folder / _STAMP, json.dumps(stamp, indent=1).encode())


def _read_stamp(folder: Path) -> dict[str, Any] | None:
    """What `stamp.json` says; None if there is none.

    Raises:
        ValueError: if it is of another version, or damaged.
    """
    try:
        stamp = json.loads((folder / _STAMP).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        stamp = None
    if not isinstance(stamp, dict) or stamp.get("format") != FORMAT:
        raise ValueError(
            f"the feature cache at {folder} was written by another version of lreg_peft, or its {_STAMP} is damaged: "
            "build it again, cache_features(..., overwrite=True)."
        )
    return stamp


def _fits(path: Path, made_from: Mapping[str, Any], overwrite: bool) -> bool:
    """Whether the complete cache at `path` is the one that is asked for; False if one is to be built or finished there.

    Raises:
        ValueError: if `path` holds what must not be replaced.
    """
    try:
        found = _read_stamp(path)
        if found is not None and "shards" in found:
            if differences := _differences(found["made_from"], made_from):
                raise ValueError(
                    f"the feature cache at {path} does not fit: {differences} differ. Give another path, or "
                    "overwrite=True."
                )
            FeatureCache(path)  # raises if it is damaged
            return True
    except ValueError:
        if not overwrite:
            raise
        return False
    if found is None and path.exists():
        foreign = [entry.name for entry in path.iterdir() if not _OWN.fullmatch(entry.name) and entry.name != _LOCK]
        if foreign:
            raise ValueError(f"{path} is not a feature cache: it holds {foreign[0]!r}. Give another path.")
    return False


# Writing


def _begin(path: Path, made_from: Mapping[str, Any]) -> None:
    """Write the stamp of a cache that is not complete, and delete whatever does not belong to it."""
    _write_stamp(path, made_from)
    for entry in path.iterdir():
        if _OWN.fullmatch(entry.name) and entry.name != _STAMP and _read_shard(entry, made_from) is None:
            entry.unlink()


def _write_shards(
    output: OutputLayer,
    batches: Iterable[Mapping[str, Any]],
    path: Path,
    made_from: Mapping[str, Any],
    dtype: torch.dtype,
    show_progress: bool,
) -> tuple[int, str, str]:
    """Write the shards of this process that are missing.

    Returns:
        How many shards there are; what is minimised, "" without rows; and the digest of the data as they came this
        time.
    """
    rank, _ = rank_and_world()
    n_shards, done, objective = 0, 0, ""
    while shard := _read_shard(path / _shard_name(rank, n_shards), made_from):  # what an interrupted build has left
        n_shards, done, objective = n_shards + 1, shard.batches, shard.objective
    digest = hashlib.blake2b(digest_size=16)
    waiting: list[tuple[Rows, list[int]]] = []
    number = 0
    for number, batch in enumerate(tqdm(batches, desc="feature cache: rows", disable=not show_progress), start=1):
        _add_to_digest(digest, batch)
        if number <= done:
            continue
        rows, counts = _rows_by_sample(output, batch, dtype)
        if len(rows.targets):
            objective = output.check(*rows, f"in batch {number - 1}, to be stored as {dtype}", objective)
        waiting.append((rows, counts))
        if sum(rows.features.nbytes for rows, _ in waiting) >= SHARD_BYTES:
            _write_shard(path / _shard_name(rank, n_shards), waiting, made_from, objective, number)
            n_shards, waiting = n_shards + 1, []
    if waiting:
        _write_shard(path / _shard_name(rank, n_shards), waiting, made_from, objective, number)
        n_shards += 1
    return n_shards, objective, digest.hexdigest()


def _rows_by_sample(output: OutputLayer, batch: Mapping[str, Any], dtype: torch.dtype) -> tuple[Rows, list[int]]:
    """Rows of a batch as they are stored, and how many each of its samples has."""
    features, targets, samples, _ = output.seen_rows(batch)
    targets = targets.float() if targets.is_floating_point() else targets
    counts = samples.bincount(minlength=len(batch["labels"])).tolist()
    return Rows(features.to("cpu", dtype), targets.cpu()), counts


def _shard_name(rank: int, number: int) -> str:
    return f"rows-{rank}-{number:05d}.safetensors"


def _write_shard(
    file: Path, parts: list[tuple[Rows, list[int]]], made_from: Mapping[str, Any], objective: str, batches: int
) -> None:
    features, targets = (torch.cat(tensors) for tensors in zip(*(rows for rows, _ in parts), strict=True))
    offsets = torch.tensor([0, *(n for _, counts in parts for n in counts)], device="cpu").cumsum(0)
    marks = {"made_from": _identity(made_from), "objective": objective, "batches": str(batches)}
    _replace(file, save({"features": features, "targets": targets, "offsets": offsets}, marks))


def _read_shard(file: Path, made_from: Mapping[str, Any]) -> Shard | None:
    """A shard of a cache; None if it is missing, cut off, or of another cache."""
    try:
        with safe_open(file, framework="pt", device="cpu") as stored:
            marks = stored.metadata() or {}
            features, targets, offsets = (stored.get_tensor(name) for name in ("features", "targets", "offsets"))
    except (OSError, SafetensorError):
        return None
    shape = (len(targets), made_from["in_features"])
    if marks.get("made_from") != _identity(made_from) or features.shape != shape or offsets[-1] != len(targets):
        return None
    return Shard(features, targets, offsets, marks["objective"], int(marks["batches"]))


def _identity(made_from: Mapping[str, Any]) -> str:
    """What shards are marked with."""
    return hashlib.blake2b(json.dumps(made_from, sort_keys=True).encode(), digest_size=16).hexdigest()


def _replace(file: Path, content: bytes) -> None:
    """Write a file so that after a kill there is the old one or the new one, whole."""
    temporary = file.with_name(file.name + ".new")
    try:
        with temporary.open("wb") as new:
            new.write(content)
            new.flush()
            os.fsync(new.fileno())
        os.replace(temporary, file)
    except OSError:
        temporary.unlink(missing_ok=True)  # room for others on a full disk
        raise
