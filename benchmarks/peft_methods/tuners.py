"""The tuners of PEFT, one declaration each: configuration, size, places, centre of the learning rates.

The rule for all of them: the places of LReg's recipe (all linear layers, and the layer that makes the logits of a
language model) if the smallest size fits into the budget there, else the narrower ones of `ALL_PLACEMENTS`; there the
largest size within the budget. A tuner that cannot go there, or has no size, stands where its authors have it.

The centres of the learning rates were found on the tuning part of the text in the study, or are
a guess from the scale of the update; the search goes on beyond the edge of a grid that missed.
"""

from collections.abc import Callable, Sequence
from math import ceil, sqrt

import peft
from peft import LoraConfig, PeftConfig
from peft.tuners.lora.config import CordaConfig, EvaConfig, KasaConfig
from torch import nn

from benchmarks.peft_methods.data_starts import start_corda, start_eva, start_gradient, start_lora_ga
from benchmarks.peft_methods.site import ATTENTION, EMBEDDING, INPUT, NORMS, Site, divisors
from benchmarks.peft_methods.tuner import Tuner, lora, of, prompt
from examples.comparison.methods import linear_layers
from examples.comparison.task import LANGUAGE_MODELS

PROMPTED = ("CAUSAL_LM", "SEQ_CLS")  # PEFT's classes that put tokens before the input


def pattern(site: Site) -> dict[str, int]:
    """Half the size on feed-forward block and head, as LoRA and LReg have it."""
    return site.pattern


def eva(site: Site) -> LoraConfig:
    """Every rank where it was; which tokens count is in the labels of running text, and else in the attention mask."""
    options = EvaConfig(rho=1.0, use_label_mask=site.fit.task.task_type == "CAUSAL_LM")
    return lora(init_lora_weights="eva", eva_config=options)(site)


def ada_lora(site: Site) -> PeftConfig:
    """Starts with the ranks the budget allows, and ends with two thirds of them, where they count most."""
    steps = site.fit.steps
    return peft.AdaLoraConfig(
        init_r=site.size,
        target_r=max(1, round(site.size * 2 / 3)),
        lora_alpha=site.size,
        tinit=steps // 10,
        tfinal=steps // 3,
        deltaT=max(1, steps // 50),
        total_step=steps,
        target_modules=site.targets,
        **site.common,
    )


def allocate(model: nn.Module, step: int) -> None:
    """AdaLoRA's allocation of the ranks."""
    model.base_model.update_and_allocate(step)  # type: ignore[operator,union-attr]


def ia3(site: Site) -> PeftConfig:
    """Scales of what attention and first feed-forward layer put out, and of what the last one takes in."""
    inputs = list(linear_layers(site.model)[1][-1:])
    return peft.IA3Config(
        target_modules=site.targets,
        feedforward_modules=[name for name in inputs if name in site.targets],
        **site.common,
    )


def layer_norms(site: Site) -> PeftConfig:
    """Weight and bias of every normalisation."""
    names = {
        name.rsplit(".", 1)[-1]
        for name, module in site.model.named_modules()
        if "norm" in type(module).__name__.lower()
    }
    return peft.LNTuningConfig(target_modules=sorted(names), **site.common)


def common_tokens(site: Site) -> PeftConfig:
    """The first tokens of the vocabulary: after the special ones those of the first, most frequent merges."""
    return peft.TrainableTokensConfig(token_indices=list(range(site.size)), task_type=site.common["task_type"])


def block_shares(least: int = 1) -> Callable[[Site], Sequence[int]]:
    """Block sizes that divide all inputs, the smallest first."""
    return lambda site: divisors(site.inputs_share, least)


def circulant_blocks(site: Site) -> Sequence[int]:
    """Block sizes that divide all inputs and outputs, the largest, with the fewest parameters, first."""
    return [size for size in reversed(divisors(site.inputs_share)) if site.outputs_share % size == 0]


def falling_ranks(site: Site) -> Sequence[int]:
    """Ranks of a full-rank sum of random matrices: the larger, the fewer of them, and the fewer parameters."""
    return range(site.least_width, 0, -1)


def vector_length(site: Site) -> int:
    """VB-LoRA's vectors divide all inputs and outputs; at most its default 256."""
    return max(size for size in circulant_blocks(site) if size <= 256)


def road_group(site: Site) -> int:
    """RoAd's groups divide all outputs, and halves of them are paired; at most its default 64."""
    return max(size for size in divisors(site.outputs_share, 2) if size <= 64 and size % 2 == 0)


def kept_rank(site: Site) -> dict[str, int]:
    """OSF names the rank it keeps, and the rest learns."""
    ranks = {}
    for name, size in site.pattern.items():
        width = min(
            min(module.weight.shape)  # type: ignore[arg-type]
            for module, (ending) in site_modules(site)
            if ending.replace(".", r"\.") == name
        )
        ranks[name] = max(width - size, 0)
    return ranks


def site_modules(site: Site) -> list[tuple[nn.Module, str]]:
    """Every module with the first ending that matches its name."""
    return [
        (module, next(ending for ending in site.targets if name == ending or name.endswith(f".{ending}")))
        for name, module in site.model.named_modules()
        if any(name == ending or name.endswith(f".{ending}") for ending in site.targets)
    ]


def hundred_thousandths(site: Site) -> Sequence[int]:
    """Shares of the weights that leave at least one to every module."""
    return range(100_000 // min(outside * inside for outside, inside in site.shapes) + 1, 100_000)


def tokens_that_fit(site: Site) -> Sequence[int]:
    """As many tokens as the model has positions for beside the input."""
    return range(1, site.free_positions + 1)


def coefficients(site: Site) -> Sequence[int]:
    """As many as every module has weights, at the most."""
    return range(1, min(outside * inside for outside, inside in site.shapes) + 1)


def tuned_tokens(site: Site) -> Sequence[int]:
    """Up to the whole vocabulary."""
    return range(1, site.model.config.vocab_size + 1)


TUNERS = (
    # --- LoRA: its starts, its variants ---
    Tuner("rslora", "rank-stabilised scale", lora(use_rslora=True), 2e-2),
    Tuner(
        "pissa",
        "LoRA from the principal directions of the weights",
        lora(init_lora_weights="pissa"),
        1.5e-2,
        changes_weights=True,
    ),
    Tuner(
        "olora",
        "LoRA from a QR decomposition of the weights",
        lora(init_lora_weights="olora"),
        1.5e-2,
        changes_weights=True,
    ),
    Tuner(
        "eva",
        "LoRA along the principal inputs",
        eva,
        2e-2,
        start=start_eva,
    ),
    Tuner(
        "corda",
        "LoRA from weights and inputs",
        lora(init_lora_weights="corda", corda_config=CordaConfig(corda_method="ipm")),
        1.5e-2,
        changes_weights=True,
        start=start_corda,
    ),
    Tuner(
        "lora-ga",
        "LoRA from the gradients of the weights",
        lora(init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig()),
        1.5e-2,
        changes_weights=True,
        start=start_lora_ga,
    ),
    Tuner(
        "lora-gradient",
        "LoRA with A along the gradients, as LReg starts, and B zero",
        lora(),
        2e-2,
        changes_weights=True,
        start=start_gradient,
    ),
    Tuner(
        "mica",
        "LoRA with B fixed at the minor directions of the weights",
        lora(init_lora_weights="mica"),
        2e-2,
        reads_weights=True,
    ),
    Tuner("lora-plus", "LoRA whose B learns 16 times faster", lora(), 5e-3, faster=("lora_B", 16.0)),
    Tuner("dora", "weight-decomposed LoRA", lora(use_dora=True), 2e-2),
    Tuner(
        "kasa",
        "LoRA with singular values between its factors",
        lora(kasa_config=KasaConfig()),
        2e-2,
        changes_weights=True,
    ),
    Tuner(
        "adalora",
        "LoRA as singular values that compete for the ranks",
        ada_lora,
        5e-2,
        "init_r",
        sizes=lambda site: range(2, site.least_width + 1),
        reads_weights=True,
        after_step=allocate,
    ),
    # --- other low-rank updates ---
    Tuner("vera", "shared random matrices, scaled", of(peft.VeraConfig, save_projection=False), 1e-1),
    Tuner(
        "vblora",
        "vectors from a shared bank",
        of(peft.VBLoRAConfig, "num_vectors", vector_length=vector_length),
        3e-2,
        "num_vectors",
        sizes=lambda site: range(2, 1 << 16),
    ),
    Tuner(
        "loha",
        "Hadamard product of two low-rank matrices",
        of(peft.LoHaConfig, alpha=lambda site: site.size, rank_pattern=pattern, alpha_pattern=pattern),
        2e-2,
    ),
    Tuner(
        "lokr",
        "Kronecker product with a low-rank factor",
        of(peft.LoKrConfig, alpha=lambda site: site.size, decompose_factor=8),
        2e-2,
    ),
    Tuner(
        "randlora",
        "full-rank sum of scaled random matrices",
        of(peft.RandLoraConfig, save_projection=False),
        3.33e-3,
        sizes=falling_ranks,
    ),
    Tuner("miss", "one matrix shared by shards of the input", of(peft.MissConfig), 2e-3),
    Tuner("delora", "LoRA with angle and strength apart", of(peft.DeloraConfig, rank_pattern=pattern), 5e-3),
    Tuner(
        "hira",
        "Hadamard product of the weights with a low-rank matrix",
        of(peft.HiraConfig, rank_pattern=pattern),
        5e-2,
    ),
    Tuner(
        "gralora",
        "LoRA in blocks",
        of(peft.GraloraConfig, alpha=lambda site: site.size),
        2e-2,
        sizes=lambda site: range(2, site.least_width + 1, 2),
    ),
    Tuner("glora", "low-rank changes of weights and biases, and their products with them", of(peft.GloraConfig), 1e-2),
    Tuner("peanut", "a small network on the weights", of(peft.PeanutConfig), 1e-2),
    Tuner("lily", "LoRA with shared, routed B", of(peft.LilyConfig), 2e-2),
    Tuner("deft", "directions removed from the weights and replaced", of(peft.DeftConfig), 2e-3),
    Tuner("pvera", "VeRA with noise", of(peft.PveraConfig, save_projection=False), 1e-1),
    Tuner(
        "tinylora",
        "few numbers through random projections",
        of(
            peft.TinyLoraConfig,
            "u",
            r=lambda site: min(max(2, ceil(sqrt(site.size))), site.least_width),
            save_projection=False,
        ),
        5e-4,
        "u",
        sizes=None,
    ),
    Tuner(
        "unilora",
        "LoRA of one vector through a sparse projection",
        of(peft.UniLoraConfig, "theta_d_length"),
        2e-2,
        "theta_d_length",
        sizes=None,
    ),
    Tuner(
        "adamss",
        "clustered subspaces of the weights",
        of(peft.AdamssConfig),
        2e-2,
        reads_weights=True,
    ),
    Tuner(
        "osf",
        "the last singular directions of the weights",
        of(peft.OSFConfig, None, rank_pattern=kept_rank),
        5e-3,
        "rank",
    ),
    # --- rotations ---
    Tuner(
        "oft",
        "block-diagonal rotations",
        of(peft.OFTConfig, "oft_block_size", r=0),
        1e-2,
        "oft_block_size",
        sizes=block_shares(2),
    ),
    Tuner(
        "boft",
        "butterfly rotations",
        of(peft.BOFTConfig, "boft_block_size"),
        1e-2,
        "boft_block_size",
        sizes=block_shares(2),
    ),
    Tuner(
        "hra", "Householder reflections", of(peft.HRAConfig), 1e-2, sizes=lambda site: range(2, site.least_width + 1, 2)
    ),
    Tuner(
        "psoft",
        "a rotation in the principal subspace",
        of(peft.PsoftConfig, psoft_alpha=lambda site: site.size),
        1e-2,
        sizes=lambda site: range(2, site.least_width + 1),
    ),
    Tuner(
        "road",
        "rotated and scaled pairs of outputs",
        of(peft.RoadConfig, None, variant=lambda site: f"road_{site.size}", group_size=road_group),
        2e-2,
        "variant",
        sizes=lambda site: (1, 2, 4),
    ),
    # --- transforms, sparse updates ---
    Tuner(
        "c3a",
        "block-circulant matrices",
        of(peft.C3AConfig, "block_size", init_weights=True),
        5e-2,
        "block_size",
        sizes=circulant_blocks,
    ),
    Tuner(
        "fourierft",
        "a few Fourier coefficients",
        of(peft.FourierFTConfig, "n_frequency", init_weights=True),
        5e-2,
        "n_frequency",
        coefficients,
    ),
    Tuner(
        "waveft", "a few wavelet coefficients", of(peft.WaveFTConfig, "n_frequency"), 5e-2, "n_frequency", coefficients
    ),
    Tuner("shira", "randomly chosen weights", of(peft.ShiraConfig, random_seed=0), 1e-2, reads_weights=True),
    Tuner(
        "supertuning",
        "the largest weights",
        of(peft.SupertuningConfig, None, sparsity=lambda site: 1.0 - 1e-5 * site.size),
        1e-2,
        "hundred-thousandths",
        sizes=hundred_thousandths,
    ),
    Tuner(
        "frod",
        "a sparse rotation and scales in a joint basis",
        of(
            peft.FrodConfig,
            None,
            sparse_rate=lambda site: 1e-4 * (site.size - 1),
            progressbar=False,
            save_projection=False,
        ),
        1e-2,
        "ten-thousandths",
        sizes=lambda site: range(1, 10_001),
        reads_weights=True,
    ),
    # --- scales and biases: no size ---
    Tuner("ia3", "scales of the activations", ia3, 5e-2, None),
    Tuner("ln-tuning", "the normalisations", layer_norms, 2e-2, None, placements=(NORMS,)),
    Tuner("beft", "biases", of(peft.BeftConfig, None), 3e-2, None),
    # --- tokens ---
    Tuner(
        "trainable-tokens",
        "embeddings of the first tokens",
        common_tokens,
        2e-2,
        "tokens",
        sizes=tuned_tokens,
        tasks=LANGUAGE_MODELS,
        placements=(EMBEDDING,),
    ),
    Tuner(
        "prompt-tuning",
        "tokens before the input",
        prompt(peft.PromptTuningConfig),
        1e-1,
        "num_virtual_tokens",
        sizes=tokens_that_fit,
        tasks=PROMPTED,
        placements=(INPUT,),
    ),
    Tuner(
        "p-tuning",
        "ten tokens before the input, made by a small network",
        prompt(peft.PromptEncoderConfig, "encoder_hidden_size", num_virtual_tokens=10),
        1e-2,
        "encoder_hidden_size",
        sizes=None,
        tasks=PROMPTED,
        placements=(INPUT,),
    ),
    Tuner(
        "prefix-tuning",
        "keys and values before the input",
        prompt(peft.PrefixTuningConfig),
        3e-2,
        "num_virtual_tokens",
        sizes=tokens_that_fit,
        tasks=PROMPTED,
        placements=(INPUT,),
    ),
    Tuner(
        "cartridge",
        "keys and values before the input, the first ones frozen",
        prompt(peft.CartridgeConfig),
        3e-2,
        "num_virtual_tokens",
        sizes=lambda site: range(2, site.free_positions + 1),
        tasks=PROMPTED,
        placements=(INPUT,),
    ),
    Tuner(
        "adaption-prompt",
        "gated tokens inside the attention of the last layers",
        lambda site: peft.AdaptionPromptConfig(
            adapter_len=site.size,
            adapter_layers=site.model.config.num_hidden_layers,
            task_type=site.common["task_type"],
        ),
        3e-2,
        "adapter_len",
        sizes=None,
        tasks=("CAUSAL_LM",),
        placements=(ATTENTION,),
    ),
)

#: What PEFT has and the comparison does not, and why.
LEFT_OUT = {
    "CPT": "wants labelled examples as its context, with a type for each of their tokens; running text has none",
    "MULTITASK_PROMPT_TUNING": "learns from several tasks at once and wants the number of the task with every sample",
    "POLY": "learns from several tasks at once and wants the number of the task with every sample",
    "SHADOW": "its parallel network cannot be sized: one layer at the model's width, or an embedding table of its own "
    "at another, is beyond the budget",
    "XLORA": "mixes adapters that are trained already",
}
