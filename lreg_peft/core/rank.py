"""Several processes, or one: the same calls work for both."""

from typing import Any, TypeVar

import torch

T = TypeVar("T")


def rank_and_world() -> tuple[int, int]:
    """This process's number and how many there are."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def gather_objects(value: T) -> list[T]:
    """The values of all processes in the order of their ranks."""
    _, world = rank_and_world()
    if world == 1:
        return [value]
    parts: list[Any] = [None] * world
    torch.distributed.all_gather_object(parts, value)
    return parts


def from_main(value: T) -> T:
    """The main process's value on every process."""
    _, world = rank_and_world()
    if world == 1:
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def barrier() -> None:
    """Wait for the others."""
    if rank_and_world()[1] > 1:
        torch.distributed.barrier()
