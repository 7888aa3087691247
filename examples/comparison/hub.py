"""Loading by name, with one clear sentence where it fails."""

import urllib.error
import urllib.request
from functools import cache
from pathlib import Path
from typing import Any

import huggingface_hub.constants
from huggingface_hub import HfApi, ModelCard

from comparison.errors import UserError

OFFLINE_HINT = (
    "without a hub, run with no arguments or give local text with --train_file and --validation_file, or GLUE's own "
    "files with --data_dir"
)
PROBE_SECONDS = 10.0


@cache
def prefer_cache_if_unreachable() -> None:
    """Ask the hub once whether it is there; if not, let the Hugging Face libraries look into their cache only.

    Their own way to find out is five retries with growing pauses for every file: more than a minute of warnings.
    """
    try:
        urllib.request.urlopen(huggingface_hub.constants.ENDPOINT, timeout=PROBE_SECONDS).close()
    except urllib.error.HTTPError:
        return  # an answer, whatever it says
    except (OSError, ValueError):
        import datasets.config  # here, because most runs do not need it and it is slow to import

        huggingface_hub.constants.HF_HUB_OFFLINE = True
        datasets.config.HF_HUB_OFFLINE = True


def load_pretrained(auto_class: Any, name: str, **options: Any) -> Any:
    """`auto_class.from_pretrained` for a local folder or a hub id."""
    is_folder = Path(name).is_dir()
    if not is_folder:
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise UserError(f"The model folder '{name}' does not exist.")
        prefer_cache_if_unreachable()
    try:
        return auto_class.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        place = "its folder" if is_folder else "the hub"
        hint = "" if is_folder else f"; {OFFLINE_HINT}"
        raise UserError(f"Could not load '{name}' from {place} ({first_line(error)}){hint}.") from error


def load_dataset(name: str, config: str | None) -> Any:
    """`datasets.load_dataset` with all splits."""
    import datasets

    datasets.disable_progress_bars()
    prefer_cache_if_unreachable()
    try:
        return datasets.load_dataset(name, config)
    except Exception as error:  # the library raises a different type for each way a download can fail
        raise UserError(
            f"Could not load the data set '{name}' from the hub ({first_line(error)}); {OFFLINE_HINT}."
        ) from error


def first_line(error: BaseException) -> str:
    """The beginning of an error's message, or its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".: ") if lines else type(error).__name__


def push_adapter(report: Any, adapters: Path, repo_id: str, private: bool) -> str:
    """Send the adapter that was best on the tuning split, with the table in its model card; returns its address."""
    metric = report.metric
    rows = [row for row in report.rows if (adapters / row.method / "adapter_config.json").exists()]

    def tuning_score(row: Any) -> float:
        return max(metric.score(trial[metric.name]) for trial in row.trials)

    best = max(rows, key=tuning_score)
    folder = adapters / best.method
    card = ModelCard.load(folder / "README.md", ignore_metadata_errors=True)
    heading = "## Comparison"
    card.text = card.text.split(heading)[0].rstrip() + (
        f"\n\n{heading}\n\n{report.title}: this is the adapter `{best.method}` ({best.summary}), the best "
        f"one on the tuning split, seed {best.steps[0]['seed']}.\n\n{report.table()}\n\n"
        + "\n".join(f"- {note}" for note in report.notes())
        + f"\n- Command: `{report.provenance['command']}`\n"
    )
    card.save(folder / "README.md")
    try:
        api = HfApi()
        repo = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo.repo_id, folder_path=folder, commit_message=f"Adapter {best.method}")
    except Exception as error:  # a different type for each way an upload can fail
        raise UserError(f"Could not send '{folder}' to the hub as '{repo_id}' ({first_line(error)}).") from error
    return str(repo)
