"""What a run trained: as tensors to keep and put back, and as files to use."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.modules.batchnorm import _BatchNorm

TRAINED_FILE = "trained.safetensors"
State = dict[str, Tensor]


def trained_state(model: nn.Module) -> State:
    """Copies of all parameters that require gradients, of all mesh nodes, and of the statistics of batch norms that are
    trained, whole and on the CPU."""
    nodes = re.compile(r"\.lreg_encoder\..*\.nodes$")
    buffers = {name: buffer for name, buffer in model.named_buffers() if nodes.search(name)}
    for path, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.weight is not None and module.weight.requires_grad:
            buffers |= {f"{path}.{name}": buffer for name, buffer in module.named_buffers()}
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name: _whole(tensor).to("cpu", copy=True).contiguous() for name, tensor in {**trained, **buffers}.items()}


def _whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def put_back(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give an equally attached model the values of `trained_state`."""
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, values in state.items():
        whole = own[name]
        if isinstance(whole, DTensor):
            values = distribute_tensor(values.to(whole.device), whole.device_mesh, whole.placements)
        whole.copy_(values)


def write_state(state: State, path: Path, run: str) -> None:
    """Keep a state beyond the life of this process; `run` says whose it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    save_file(state, new, metadata={"run": run})
    new.replace(path)  # never half a file under the real name


def read_state(path: Path, run: str) -> State | None:
    """The kept state of `run`, None if there is none or it is another's."""
    if not path.exists():
        return None
    with safe_open(path, "pt") as file:
        if (file.metadata() or {}).get("run") != run:
            return None
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dictionary)


def save_trained(model: nn.Module, state: State, directory: Path) -> int:
    """Save what was trained and nothing else; return the bytes its weights take on disk.

    PEFT adapters and the fully fine-tuned model are saved as such; BitFit and the other parts of a model have no format
    of their own, so their parameters go into one safetensors file under their names.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if isinstance(model, PeftModel):
        # Without the output embedding, which PEFT would add to an adapter on the head: it is the base model's.
        model.save_pretrained(directory, state_dict=state, save_embedding_layers=False)
    elif all(parameter.requires_grad for parameter in model.parameters()):
        model.save_pretrained(directory, state_dict=state)  # type: ignore[operator]
    else:
        save_file(state, directory / TRAINED_FILE)
    return weight_bytes(directory)


def weight_bytes(directory: Path) -> int:
    """Size of the weights in a folder."""
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))
