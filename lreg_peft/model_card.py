"""What a model card must say about an LReg adapter."""

from pathlib import Path

from huggingface_hub import ModelCard

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


def add_usage_to_card(save_directory: str | Path) -> None:
    """Put the import line into the model card of a saved adapter.

    The card lies in the folder itself, or in its parent for an adapter that is not called "default". Only a card that
    PEFT wrote for a model with the tag `lreg` is touched, and only once.
    """
    folder = Path(save_directory)
    for path in (folder / "README.md", folder.parent / "README.md"):
        if path.is_file() and _is_lreg_card(path):
            card = ModelCard.load(path, ignore_metadata_errors=True)
            if _IMPORT not in card.text:
                card.text = f"{card.text.rstrip()}\n\n{_USAGE}"
                card.save(path)
            return


def _is_lreg_card(path: Path) -> bool:
    text = path.read_text(encoding="utf-8", errors="replace")
    if not text.startswith("---"):
        return False
    data = ModelCard.load(path, ignore_metadata_errors=True).data
    return data.get("library_name") == "peft" and TAG in (data.get("tags") or [])
