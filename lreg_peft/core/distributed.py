"""Several processes, or one: the same calls work for both."""

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

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


def raise_together(error: Exception | None) -> None:
    """Raise on every process if one has an error: otherwise the others would wait for it for ever.

    Raises:
        The given error where there is one; elsewhere a `RuntimeError` that quotes that of the other process.
    """
    errors = gather_objects(None if error is None else str(error))
    if error is not None:
        raise error
    for rank, message in enumerate(errors):
        if message is not None:
            raise RuntimeError(f"process {rank} stopped: {message}")


class AllProcesses(Processes):
    """The processes of this run, each with its share of the samples."""

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over the processes, bit-identical on all."""
        return sum_over_processes([tensor])[0]

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all processes, of equal shapes, in the order of their ranks."""
        return [part.to(tensor.device) for part in gather_objects(tensor.cpu())]
