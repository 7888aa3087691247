"""DeepSpeed, ZeRO-2 and ZeRO-3: two CPU processes train what one process trains, and what is saved loads into a base.

    pip install hjson msgpack ninja py-cpuinfo einops wheel
    DS_BUILD_OPS=0 DS_ACCELERATOR=cpu pip install deepspeed --no-deps --no-build-isolation

It needs a C++ compiler: the first run builds DeepSpeed's communication on CPUs, in some minutes.
"""

import os

os.environ["DS_ACCELERATOR"] = "cpu"

from functools import partial
from pathlib import Path

import deepspeed
import torch
from common import STEPS, WEIGHTINGS, batch, causal_lm, config, run, same_as_alone, shake
from peft import get_peft_model


def train(rank: int, stage: int, weighting: str, folder: Path) -> None:
    """Half of the batch in each process; then the adapter is saved from what trains, as a trainer does it."""
    model = get_peft_model(causal_lm(), config(weighting))
    shake(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(trained, lr=1e-2),
        dist_init_required=False,
        config={
            "train_micro_batch_size_per_gpu": 2,
            "gradient_clipping": 0.0,  # it clips unless told not to
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        },
    )
    engine.train()
    ids = batch().chunk(2)[rank]
    for _ in range(STEPS):
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3):
        state = {name: value.clone() for name, value in model.state_dict().items() if name in names}
    if rank == 0:
        model.save_pretrained(folder, state_dict=state)


if __name__ == "__main__":
    run(
        {
            f"ZeRO-{stage}, {weighting} weighting": partial(same_as_alone, train, stage, weighting)
            for stage in (2, 3)
            for weighting in WEIGHTINGS
        }
    )
