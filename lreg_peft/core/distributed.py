"""Several processes, or one: the same calls work for both.

One rule for everything that processes do together: what one of them cannot do on its own account stands in a
`together` block, without communication inside. If it fails on one process, all of them end with that error; nobody
waits for a process that has gone. What all must have alike is compared by `require_equal` before anything begins.
"""

import builtins
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .fingerprint import fingerprint
from .solve.problem import Processes

T = TypeVar("T")


def rank_and_world() -> tuple[int, int]:
    """This process's number and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gather_objects(value: T) -> list[T]:
    """The values of all processes in the order of their ranks."""
    _, world = rank_and_world()
    if world == 1:
        return [value]
    parts: list[Any] = [None] * world
    dist.all_gather_object(parts, value)
    return parts


def from_main(value: T) -> T:
    """The main process's value on every process."""
    _, world = rank_and_world()
    if world == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def communication_device(device: torch.device) -> torch.device:
    """`device`, or an accelerator where the backend cannot send from the CPU."""
    if device.type == "cpu" and dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return device


def sum_over_processes(tensors: list[Tensor]) -> list[Tensor]:
    """Sums in fp64 over the processes, bit-identical on all; one collective whatever the number of tensors."""
    if rank_and_world()[1] == 1:
        return tensors
    device = communication_device(tensors[0].device)
    flat = torch.cat([tensor.to(device, torch.float64).flatten() for tensor in tensors])
    dist.all_reduce(flat)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor).to(tensor.device) for part, tensor in zip(parts, tensors, strict=True)]


def tensor_from_main(tensor: Tensor) -> Tensor:
    """What process 0 has: processors of different kinds may round differently."""
    if rank_and_world()[1] == 1:
        return tensor
    sent = tensor.to(communication_device(tensor.device), copy=True).contiguous()
    dist.broadcast(sent, 0)
    return sent.to(tensor.device)


@contextmanager
def together() -> Iterator[None]:
    """A stage that every process goes through by itself: if it fails on one, it fails on all, with one error.

    There must be no communication inside. An interruption (`KeyboardInterrupt`) counts as an error.

    Raises:
        With one process the error itself. With several that of the first that has one, on all of them: an error of
        the same class if it is one of Python's own, else a `RuntimeError`, whose message begins "process N stopped: ".
    """
    error: BaseException | None = None
    try:
        yield
    except BaseException as caught:
        error = caught
    if rank_and_world()[1] == 1:
        if error is not None:
            raise error
        return
    for rank, told in enumerate(gather_objects(None if error is None else (type(error).__name__, str(error)))):
        if told is not None:
            name, text = told
            kind = getattr(builtins, name, None)
            if isinstance(kind, type) and issubclass(kind, BaseException) and not issubclass(kind, UnicodeError):
                raise kind(f"process {rank} stopped: {text}") from error
            raise RuntimeError(f"process {rank} stopped: {name}: {text}") from error


def require_equal(values: Mapping[str, Any], advice: str = "") -> None:
    """Make sure that all processes have the same values; all take part.

    Args:
        values: by name: tensors, compared bit by bit, and whatever else has a `repr`.
        advice: what to change, one sentence.

    Raises:
        ValueError: on every process, with the names of what differs.
    """
    _, world = rank_and_world()
    if world == 1:
        return
    gathered = gather_objects(
        {name: fingerprint(value) if isinstance(value, Tensor) else repr(value) for name, value in values.items()}
    )
    for rank, others in enumerate(gathered):
        different = [name for name in {**gathered[0], **others} if gathered[0].get(name) != others.get(name)]
        if different:
            more = f" and {len(different) - 1} more" if len(different) > 1 else ""
            raise ValueError(
                f"all processes must begin with the same values, but {different[0]!r}{more} of process {rank} "
                f"{'is' if not more else 'are'} not that of process 0. {advice}".rstrip()
            )


class AllProcesses(Processes):
    """The processes of this run, each with its share of the samples."""

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over the processes, bit-identical on all."""
        return sum_over_processes([tensor])[0]

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all processes, of equal shapes, in the order of their ranks."""
        return [part.to(tensor.device) for part in gather_objects(tensor.cpu())]

    def together(self) -> Any:
        """See `together`."""
        return together()
