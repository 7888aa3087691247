"""Short names for the contents of tensors, computed where the tensors are."""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

_AT_ONCE = 1 << 22
_KINDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_MULTIPLIER = -7046029254386353131  # 2**64 over the golden ratio, odd


def fingerprint(tensor: Tensor) -> str:
    """Of dtype, shape and every bit in its place, the same on every device.

    Two sums modulo 2**64 over the bit patterns, one of them weighted by a scrambled place: a change of values or of
    their order shows, against accidents and not against forgers.
    """
    flat = tensor.detach().contiguous().reshape(-1)
    words = f"{tensor.dtype}{tuple(tensor.shape)}"
    if flat.is_meta:
        return words
    bits = flat.view(_KINDS.get(flat.element_size(), torch.uint8))
    sums = torch.zeros(2, dtype=torch.int64, device=flat.device)
    for start in range(0, len(bits), _AT_ONCE):
        part = bits[start : start + _AT_ONCE].long()
        place = torch.arange(start + 1, start + 1 + len(part), device=flat.device) * _MULTIPLIER
        sums += torch.stack((part.sum(), (part * (place ^ (place >> 29))).sum()))
    return f"{words}{sums.tolist()}"


def fingerprint_of_all(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Of named tensors, in order."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in tensors:
        digest.update(f"{name}{fingerprint(tensor)}".encode())
    return digest.hexdigest()


def is_sharded(model: nn.Module) -> bool:
    """Whether processes hold parts of the parameters, so that what they hold is not to be compared."""
    return any(hasattr(p, "full_tensor") or p.is_meta for p in model.parameters()) or any(
        type(module).__name__ in ("FullyShardedDataParallel", "DeepSpeedEngine") for module in model.modules()
    )
