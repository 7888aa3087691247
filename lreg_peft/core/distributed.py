"""Several processes, or one: the same calls work for both.

One rule for everything that processes do together: what one of them cannot do on its own account stands in a
`together` block, without communication inside. If it fails on one process, all of them end with that error; nobody
waits for a process that has gone. What all must have alike is compared by `require_equal` before anything begins.
"""

import pickle
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .fingerprint import fingerprint, is_sharded
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


def barrier() -> None:
    """Wait for the others."""
    if rank_and_world()[1] > 1:
        dist.barrier()


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
    """A stage that every process goes through by itself: if it fails on one, it fails on all, with the same error.

    There must be no communication inside. An interruption (`KeyboardInterrupt`) counts as an error.

    Raises:
        As `raise_together`.
    """
    error: BaseException | None = None
    try:
        yield
    except BaseException as caught:
        error = caught
    raise_together(error)


def raise_together(error: BaseException | None) -> None:
    """Raise on every process if one has an error: otherwise the others would wait for it for ever.

    Raises:
        With one process the error itself. With several the error of the first that has one, of the same class and
        with the same message on all of them, which begins "process N stopped: "; a `RuntimeError` where the class
        cannot be made anew.
    """
    if rank_and_world()[1] == 1:
        if error is not None:
            raise error
        return
    for rank, packed in enumerate(gather_objects(None if error is None else _packed(error))):
        if packed is not None:
            raise _rebuilt(packed, rank) from error


def _packed(error: BaseException) -> tuple[bytes | None, int | None, str, str]:
    """Class, where another process can have it, error number, name and message."""
    kind = type(error)
    try:
        data = pickle.dumps(kind)
    except Exception:  # a class inside a function
        data = None
    return data, error.errno if isinstance(error, OSError) else None, kind.__name__, _text(error)


def _text(error: BaseException) -> str:
    return str(error.strerror) if isinstance(error, OSError) and error.strerror else str(error)


def _rebuilt(packed: tuple[bytes | None, int | None, str, str], rank: int) -> BaseException:
    data, number, name, text = packed
    words = f"process {rank} stopped: {text}"
    try:
        if data is not None:
            kind = pickle.loads(data)
            error = kind(words) if number is None else kind(number, words)
            if isinstance(error, BaseException) and words in str(error):
                return error
    except Exception:  # wants other arguments, or cannot be imported here
        pass
    return RuntimeError(f"process {rank} stopped: {name}: {text}")


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


def require_equal_models(model: nn.Module, advice: str, without: Iterable[Tensor] = ()) -> None:
    """Make sure that all processes have the same weights, as everything that is computed by all of them takes for
    granted; not for sharded ones, which the processes hold parts of.

    Args:
        model: the model; its parameters and persistent buffers are compared.
        advice: what to change, one sentence.
        without: tensors of the model that may differ, since they are about to be replaced.

    Raises:
        ValueError: on every process, with the name of the first tensor that differs.
    """
    if rank_and_world()[1] > 1 and not any(gather_objects(is_sharded(model))):
        left_out = {tensor.data_ptr() for tensor in without}
        tensors = model.state_dict().items()
        require_equal({name: tensor for name, tensor in tensors if tensor.data_ptr() not in left_out}, advice)


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
