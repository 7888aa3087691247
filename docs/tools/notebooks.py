"""A page as a Jupyter notebook: its blocks of Python are the cells of code, what stands between them the text.

python docs/tools/notebooks.py docs/tutorials/regression.md > regression.ipynb
"""

import json
import re
import sys
from pathlib import Path

BLOCK = re.compile(r"^```python\n(.*?)^```\n?", flags=re.DOTALL | re.MULTILINE)


def cells(page: str) -> list[tuple[str, str]]:
    """The parts of a page in order, each ("markdown" or "code", text)."""
    parts, end = [], 0
    for block in BLOCK.finditer(page):
        parts += [("markdown", page[end : block.start()]), ("code", block[1])]
        end = block.end()
    parts.append(("markdown", page[end:]))
    return [(kind, text.strip("\n")) for kind, text in parts if text.strip()]


def notebook(page: str) -> str:
    """The JSON of a notebook (format 4.5)."""
    entries = []
    for number, (kind, text) in enumerate(cells(page)):
        entry = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}, "source": text.splitlines(keepends=True)}
        entries.append(entry | ({"execution_count": None, "outputs": []} if kind == "code" else {}))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return json.dumps({"cells": entries, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}, indent=1) + "\n"


if __name__ == "__main__":
    print(notebook(Path(sys.argv[1]).read_text(encoding="utf-8")), end="")
