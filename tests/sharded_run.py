"""An example script on CPU processes with its parameters sharded, as the FSDP config file has it on GPUs.

    torchrun --nproc_per_node 2 tests/sharded_run.py CONFIG.yaml SCRIPT.py [OPTIONS ...]

Accelerate shards on accelerators only. Three of its answers are changed, so that it takes these processes for such;
torch shards on a CPU as it does elsewhere. The settings are those of the config file.
"""

import os
import runpy
import sys
from pathlib import Path

import torch
import yaml
from accelerate import PartialState
from accelerate.utils import DistributedType
from transformers import TrainingArguments


def settings(config: Path) -> dict[str, str]:
    """The environment that `accelerate launch --config_file` makes of an FSDP config file."""
    content = yaml.safe_load(config.read_text(encoding="utf-8"))
    assert content["distributed_type"] == "FSDP"
    return {
        "ACCELERATE_USE_FSDP": "true",
        "ACCELERATE_MIXED_PRECISION": content["mixed_precision"],
        **{name.upper(): str(value) for name, value in content["fsdp_config"].items()},
    }


def pretend(arguments: TrainingArguments) -> None:
    """Let a Trainer accept a CPU that counts as an accelerator."""
    arguments.use_cpu = False
    _post_init(arguments)


if __name__ == "__main__":
    os.environ.update(settings(Path(sys.argv[1])), ACCELERATE_TORCH_DEVICE="cpu")
    torch.distributed.init_process_group("gloo")
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    _post_init, TrainingArguments.__post_init__ = TrainingArguments.__post_init__, pretend
    sys.argv = sys.argv[2:]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))  # as for a script that is started itself
    runpy.run_path(sys.argv[0], run_name="__main__")
    torch.distributed.destroy_process_group()
