"""Which models of Transformers take the recommended adapter for which task: the table in docs/reference/models.md.

    python docs/tools/model_matrix.py            # writes the table, some minutes on a CPU core

Every cell is a tiny model with random weights. "yes": the adapted model starts as the base model, a training step moves
every shortcut, and what is saved gives the same output on a fresh base. A dash: Transformers has no such class.
"""

import copy
import os
import sys
import tempfile
import warnings
from pathlib import Path

import torch
import transformers
from peft import PeftModel, get_peft_model

import lreg_peft

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reference" / "models.md"
BEGIN, END = "<!-- table: made by docs/tools/model_matrix.py -->\n", "<!-- end of table -->\n"
sys.path.insert(0, str(ROOT / "tests"))
import tiny  # noqa: E402

TASKS = {
    "CAUSAL_LM": "causal LM",
    "SEQ_2_SEQ_LM": "sequence to sequence",
    "MASKED_LM": "masked LM",
    "SEQ_CLS": "sequence classes",
    "TOKEN_CLS": "token classes",
    "QUESTION_ANS": "question answering",
    "FEATURE_EXTRACTION": "features",
    "IMAGE_CLS": "image classes",
}
#: Tasks that PEFT has no word for.
UNNAMED = ("MASKED_LM", "IMAGE_CLS")
_KINDS = {
    "CAUSAL_LM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "SEQ_2_SEQ_LM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "MASKED_LM": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "SEQ_CLS": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "TOKEN_CLS": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "QUESTION_ANS": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    "FEATURE_EXTRACTION": "MODEL_MAPPING_NAMES",
    "IMAGE_CLS": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
}
MODELS = sorted({*tiny.SIZES, *tiny.IMAGE_MODELS})


def tasks_of(model_type: str) -> list[str]:
    """Tasks that Transformers has a class for; of image models nothing but classification."""
    named = transformers.models.auto.modeling_auto
    tasks = ["IMAGE_CLS"] if model_type in tiny.IMAGE_MODELS else list(TASKS)
    return [task for task in tasks if model_type in getattr(named, _KINDS[task])]


def model_and_batch(model_type: str, task: str) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A tiny model in eval mode and a batch with what gives a loss."""
    if task == "IMAGE_CLS":
        model, batch = tiny.image_model(model_type)
        generator = torch.Generator().manual_seed(0)
        for weight in model.parameters():
            if not weight.any():  # a class token of zeros in a single layer asks no key for anything
                weight.data.normal_(std=0.1, generator=generator)
        return model, batch
    model = tiny.build(model_type, task, **({"num_labels": 3} if task in ("SEQ_CLS", "TOKEN_CLS") else {}))
    batch = tiny.inputs(model)
    ids = batch["input_ids"]
    if task in ("CAUSAL_LM", "SEQ_2_SEQ_LM", "MASKED_LM"):
        batch["labels"] = ids
    elif task == "SEQ_CLS":
        batch["labels"] = torch.arange(len(ids)) % 3
        ids[:, -1] = model.config.eos_token_id or 1  # T5 reads the class there
    elif task == "TOKEN_CLS":
        batch["labels"] = ids % 3
    elif task == "QUESTION_ANS":
        batch.update(start_positions=torch.ones(len(ids), dtype=torch.long))
        batch.update(end_positions=torch.full((len(ids),), 3))
    return model, batch


def first(output: object) -> torch.Tensor:
    """What the output is compared by."""
    found = [output[name] for name in ("logits", "start_logits", "last_hidden_state") if name in output]
    return found[0].detach()


def check(model_type: str, task: str) -> None:
    """Raise AssertionError, or whatever fails, unless the adapter works."""
    base, batch = model_and_batch(model_type, task)
    with torch.no_grad():
        expected = first(base(**batch))
    fresh = copy.deepcopy(base)
    config = lreg_peft.LRegConfig(task_type=None if task in UNNAMED else task)
    model = get_peft_model(base, config).eval()
    with torch.no_grad():
        assert torch.allclose(first(model(**batch)), expected, atol=1e-5), "starts as another function"
    layers = tiny.layers(model)
    assert layers, "adapts nothing"
    before = [layer.lreg_coefficients["default"].weight.detach().clone() for layer in layers]
    output = model(**batch)
    loss = output.loss if "loss" in output else output.last_hidden_state.square().mean()
    optimizer = torch.optim.Adam([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    loss.backward()
    optimizer.step()
    moved = [
        not torch.equal(layer.lreg_coefficients["default"].weight, weight)
        for layer, weight in zip(layers, before, strict=True)
    ]
    assert all(moved), f"{moved.count(False)} of {len(moved)} shortcuts do not learn"
    with torch.no_grad():
        trained = first(model(**batch))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(fresh, folder).eval()
    with torch.no_grad():
        assert torch.allclose(first(loaded(**batch)), trained, atol=1e-5), "comes back as another function"


def cell(model_type: str, task: str) -> str:
    """A word of the table."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check(model_type, task)
    except Exception as error:
        return str(error).partition("\n")[0][:80].replace("|", "/") or type(error).__name__
    return "yes"


def table(models: list[str]) -> str:
    """The table in Markdown."""
    lines = [f"| model | {' | '.join(TASKS.values())} |", f"|---|{':-:|' * len(TASKS)}"]
    for model_type in models:
        able = tasks_of(model_type)
        words = [cell(model_type, task) if task in able else "\N{EN DASH}" for task in TASKS]
        lines.append(f"| `{model_type}` | {' | '.join(words)} |")
    return "\n".join(lines) + "\n"


def rows_of_page() -> dict[str, str]:
    """The rows that the page has, by model."""
    text = PAGE.read_text(encoding="utf-8")
    rows = text[text.index(BEGIN) + len(BEGIN) : text.index(END)].splitlines()[2:]
    return {row.split("`")[1]: row for row in rows}


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    text = PAGE.read_text(encoding="utf-8")
    middle = table(MODELS)
    PAGE.write_text(text[: text.index(BEGIN) + len(BEGIN)] + middle + text[text.index(END) :], encoding="utf-8")
    print(middle)
