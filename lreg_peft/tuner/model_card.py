"""What a model card must say about an LReg adapter."""

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
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


def add_usage_to_card(path: str | Path, model: nn.Module) -> None:
    """Put the lines that load the adapters of `model` into the model card in the file `path`, once."""
    card = ModelCard.load(path, ignore_metadata_errors=True)
    if _add_usage(card, model):
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
    _add_usage(card, model)
    message = "Say in the model card how to load the adapter"
    return card.push_to_hub(repo_id, token=token, commit_message=message, revision=revision)  # type: ignore[arg-type]


def _add_usage(card: ModelCard, model: nn.Module) -> bool:
    """Append the sections that apply unless they are there; whether the card changed."""
    configs = model.peft_config.values()  # type: ignore[union-attr,operator]
    has_grades = any(getattr(config, "previous_grades", None) for config in configs)
    wanted = {_IMPORT: _USAGE, **({_LOAD_GRADES: _USAGE_OF_GRADES} if has_grades else {})}
    missing = [section for line, section in wanted.items() if line not in card.text]
    card.text = "\n\n".join([card.text.rstrip(), *missing]) if missing else card.text
    return bool(missing)
