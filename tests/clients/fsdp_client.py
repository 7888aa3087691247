"""FSDP1 with PEFT's wrap policy: two CPU processes train what one process trains."""

from functools import partial
from pathlib import Path

import torch
from common import STEPS, WEIGHTINGS, batch, causal_lm, config, run, same_as_alone, shake
from peft import get_peft_model
from peft.utils.other import fsdp_auto_wrap_policy
from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, StateDictType


def train(rank: int, weighting: str, folder: Path) -> None:
    """Half of the batch in each process."""
    model = get_peft_model(causal_lm(), config(weighting))
    shake(model)
    sharded = FullyShardedDataParallel(
        model, auto_wrap_policy=fsdp_auto_wrap_policy(model), device_id=torch.device("cpu"), use_orig_params=False
    )
    optimizer = torch.optim.AdamW([p for p in sharded.parameters() if p.requires_grad], lr=1e-2)
    sharded.train()
    ids = batch().chunk(2)[rank]
    for _ in range(STEPS):
        sharded(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    whole = FullStateDictConfig(rank0_only=True)
    with FullyShardedDataParallel.state_dict_type(sharded, StateDictType.FULL_STATE_DICT, whole):
        state = sharded.state_dict()
    if rank == 0:
        # PEFT 0.21 leaves out what lies inside wrapped blocks when it saves the wrapped model itself, of LoRA as well.
        plain = get_peft_model(causal_lm(), config(weighting))
        plain.load_state_dict(state)
        plain.save_pretrained(folder)


if __name__ == "__main__":
    run(
        {
            f"PEFT's wrap policy, {weighting} weighting": partial(same_as_alone, train, weighting)
            for weighting in WEIGHTINGS
        }
    )
