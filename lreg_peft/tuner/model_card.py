"""What a model card must say about an LReg adapter: how to load it."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from torch import nn

TAG = "lreg"
_IMPORT = "import lreg_peft"
_REPOSITORY = "<this repository>"
_USAGE = """## How to load this adapter

This is an LReg adapter. Install the package and import it before PEFT loads the adapter:

```bash
pip install lreg_peft
```

```python
import lreg_peft  # registers LReg with PEFT
{loading}
```
"""


def add_usage_to_saved_card(folder: str | Path, config: Any) -> None:
    """Put the lines that load an adapter into the model card that PEFT has written beside it, once.

    Args:
        folder: where the adapter is; the card of an adapter with a name of its own lies one level above.
        config: an `LRegConfig`.
    """
    for place in (Path(folder), Path(folder).parent):
        path = place / "README.md"
        if path.is_file():
            card = ModelCard.load(path, ignore_metadata_errors=True)
            if card.data.get("library_name") == "peft" and _add_usage(card, config):
                card.save(path)
            return


def push_model_card(
    model: nn.Module, repo_id: str, *, token: str | bool | None = None, revision: str | None = None
) -> str:
    """Put tag, base model and the lines that load the adapter into the card of a repository; what else it says stays.

    To be called after `push_to_hub`, which uploads a card of its own that does not name the method.

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
    configs = list(model.peft_config.values())  # type: ignore[union-attr,operator]
    config = next((one for one in configs if getattr(one, "previous_grades", None)), configs[0])
    card.data["library_name"] = "peft"
    card.data["tags"] = sorted({*(card.data.get("tags") or []), TAG})
    base_model = config.base_model_name_or_path
    if base_model and not Path(base_model).exists():  # the Hub refuses local paths
        card.data["base_model"] = base_model
    _add_usage(card, config)
    message = "Say in the model card how to load the adapter"
    return card.push_to_hub(repo_id, token=token, commit_message=message, revision=revision)  # type: ignore[arg-type]


def _add_usage(card: ModelCard, config: Any) -> bool:
    """Append the section unless the card has it; whether it changed."""
    if _IMPORT in card.text:
        return False
    card.text = f"{card.text.rstrip()}\n\n{_USAGE.format(loading=_loading(config))}"
    return True


def _loading(config: Any) -> str:
    """The code that loads an adapter with this configuration."""
    base = f"base_model = ...  # {config.base_model_name_or_path or 'the model that the adapter was trained on'}"
    if getattr(config, "previous_grades", None):
        load = f'lreg_peft.load_grades(base_model, "{_REPOSITORY}")  # a stack of grades, all of them'
    else:
        base = f"from peft import PeftModel\n\n{base}"
        load = f'PeftModel.from_pretrained(base_model, "{_REPOSITORY}")'
    return f"{base}\nmodel = {load}"
