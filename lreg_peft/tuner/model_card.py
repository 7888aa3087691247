"""What a model card must say about an LReg adapter."""

import re
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..core.checks import checked, named

TAG = "lreg"
_IMPORT = "import lreg_peft"
_USAGE = f"""## How to load this adapter

This is an LReg adapter. Install `lreg_peft` and import it before PEFT loads the adapter:

```python
{_IMPORT}  # registers LReg with PEFT
from peft import AutoPeftModel

model = AutoPeftModel.from_pretrained("<this repository>")
```

An adapter for a task loads the same way with the class of that task, e.g. `AutoPeftModelForCausalLM`.
"""

_LOAD_GRADES = "lreg_peft.load_grades("
_USAGE_OF_GRADES = f"""The adapters are grades, trained on top of each other. This loads them all:

```python
model = {_LOAD_GRADES}base_model, "<this repository>")
```
"""


_TEMPLATE_TITLE = "# Model Card for Model ID"
_PLACEHOLDER = "[More Information Needed]"
# Sentences of the template that say nothing without what was to be filled in around them.
_TEMPLATE_TEXT = (
    "Users (both direct",
    "Use the code below",
    "Carbon emissions can be",
    "**BibTeX:**",
    "**APA:**",
    "## Model Card Contact",
)


def add_usage_to_card(path: str | Path, model: nn.Module) -> None:
    """Put the lines that load the adapters of `model` into the model card in the file `path`, once."""
    card = ModelCard.load(path, ignore_metadata_errors=True)
    if not card.data.to_dict().get("base_model"):  # a base without a name: neither is there a tag for it
        card.data.base_model = None
        card.data.tags = [tag for tag in card.data.tags or [] if tag != "base_model:adapter:"] or None
    _clear_template(card, model)
    _add_usage(card, model)
    card.save(path)


@checked(repo_id=named(), revision=named())
def push_model_card(
    model: nn.Module, repo_id: str, *, token: str | bool | None = None, revision: str | None = None
) -> str:
    """Put tag, base model and import line into the card of a repository on the Hub; what else it says stays.

    `push_to_hub` of a `PeftModel` does this by itself. A Transformers model with an adapter of its own
    (`model.add_adapter`) uploads a card without the import line: call this after pushing it.

    Args:
        model: the pushed model: a `PeftModel`, or a Transformers model with an adapter.
        repo_id: the repository.
        token: as for `push_to_hub`.
        revision: branch or pull request to commit to.

    Returns:
        Address of the commit.
    """
    try:
        file = hf_hub_download(repo_id, "README.md", token=token, revision=revision)
        card = ModelCard.load(file, ignore_metadata_errors=True)
    except EntryNotFoundError:
        card = ModelCard.from_template(ModelCardData())
    card.data["library_name"] = "peft"
    card.data["tags"] = sorted({*(card.data.get("tags") or []), TAG})
    base_model = next(iter(model.peft_config.values())).base_model_name_or_path  # type: ignore[union-attr,operator]
    if base_model and not Path(base_model).exists():  # the Hub refuses local paths
        card.data["base_model"] = base_model
    _clear_template(card, model)
    _add_usage(card, model)
    message = "Say in the model card how to load the adapter"
    return card.push_to_hub(repo_id, token=token, commit_message=message, revision=revision)  # type: ignore[arg-type]


def _clear_template(card: ModelCard, model: nn.Module) -> None:
    """Replace an unedited template by what is known of the adapters; a card that somebody wrote stays as it is."""
    if _TEMPLATE_TITLE not in card.text:
        return
    template, heading, versions = card.text.partition("### Framework versions")  # which PEFT appends
    text = re.sub(r"<!--.*?-->", "", template, flags=re.DOTALL)
    lines = [line.rstrip() for line in text.splitlines() if _PLACEHOLDER not in line]
    kept: list[str] = []
    for line in reversed([line for line in lines if not line.startswith(_TEMPLATE_TEXT)]):
        level = len(line) - len(line.lstrip("#"))
        below = next((other for other in reversed(kept) if other), "#")
        # A heading with nothing below it but another heading of its level or above.
        if not (level and below.startswith("#") and len(below) - len(below.lstrip("#")) <= level):
            kept.append(line)
    text = "\n".join(reversed(kept)).replace(_TEMPLATE_TITLE, "").strip()
    parts = ["# LReg adapter", _description(model), text, f"{heading}{versions}".strip()]
    card.text = re.sub(r"\n{3,}", "\n\n", "\n\n".join(part for part in parts if part)) + "\n"


def _description(model: nn.Module) -> str:
    """One line per adapter: where its shortcuts are and how large they are."""
    lines = []
    for name, config in model.peft_config.items():  # type: ignore[union-attr,operator]
        if getattr(config, "head_name", None) is None:
            continue
        layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer) and name in getattr(m, "lreg_nodes", ())]
        size = sum(weight.numel() for layer in layers for weight in layer.weights(name).values())  # type: ignore[operator]
        saved = f", and {', '.join(config.modules_to_save)} trained in full" if config.modules_to_save else ""
        lines.append(
            f"- `{name}`: {len(layers)} piecewise-linear shortcuts with {size:,} parameters around "
            f"{_targets(config.target_modules)}{saved}; head `{config.head_name}`, n_components={config.n_components}, "
            f"dof={config.dof}."
        )
    return "\n".join(lines)


def _targets(targets: list[str] | str) -> str:
    if isinstance(targets, str):
        return f"`{targets}`"
    names = [f"`{name}`" for name in targets]
    return ", ".join(names if len(names) <= 8 else [*names[:7], f"and {len(names) - 7} more"])


def _add_usage(card: ModelCard, model: nn.Module) -> bool:
    """Append the sections that apply unless they are there; whether the card changed."""
    configs = model.peft_config.values()  # type: ignore[union-attr,operator]
    has_grades = any(getattr(config, "previous_grades", None) for config in configs)
    wanted = {_IMPORT: _USAGE, **({_LOAD_GRADES: _USAGE_OF_GRADES} if has_grades else {})}
    missing = [section for line, section in wanted.items() if line not in card.text]
    card.text = "\n\n".join([card.text.rstrip(), *missing]) if missing else card.text
    return bool(missing)
