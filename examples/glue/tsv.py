"""The official GLUE files: tab-separated, never quoted, each task with columns and habits of its own.

A quotation mark in these files is a character of the sentence like any other: a CSV reader with its usual settings
joins thousands of lines into one where a sentence happens to open with one.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from examples.comparison.options import UserError
from examples.glue.tasks import Task

# Line breaks inside a question tore 24 rows of QQP's training file apart. Beyond this share it is another format.
MAX_TORN_SHARE = 0.01


def find_file(data_dir: Path, task: Task, part: str, suffix: str = "") -> Path:
    """The file of a part ("train" or "validation"): in `data_dir` or in the task's folder inside it."""
    stems = [part + suffix, *(["dev" + suffix] if part == "validation" else [])]
    candidates = [folder / f"{stem}.tsv" for folder in (data_dir / task.folder, data_dir) for stem in stems]
    for path in candidates:
        if path.is_file():
            return path
    raise UserError(
        f"'{data_dir}' has no {part} file of {task.title}: looked for "
        f"{', '.join(str(path.relative_to(data_dir)) for path in candidates)}."
    )


def read_tsv(path: Path, task: Task) -> tuple[list[tuple[str, ...]], list[str], int]:
    """Sentences and labels as they stand in the file, and the number of torn rows left out.

    Returns:
        texts, one or two per row; labels; the number of rows that lack a column.
    """
    rows = split_lines(path)
    columns = (*task.tsv.sentences, task.tsv.label)
    if task.tsv.has_header:
        header = next(rows, [])
        missing = [str(column) for column in columns if column not in header]
        if missing:
            raise UserError(
                f"The file '{path}' has no column {', '.join(map(repr, missing))}, which {task.title} needs; "
                f"its first line names {', '.join(map(repr, header)) or 'none'}."
            )
        positions = [header.index(str(column)) for column in columns]
    else:
        positions = [int(column) for column in columns]

    texts, labels, n_torn = [], [], 0
    for row in rows:
        if len(row) <= max(positions) or not all(row[position].strip() for position in positions):
            n_torn += 1
            continue
        *sentences, label = (row[position].strip() for position in positions)
        texts.append(tuple(sentences))
        labels.append(label)
    check_torn(path, task, n_torn, len(texts), positions)
    return texts, labels, n_torn


def split_lines(path: Path) -> Iterator[list[str]]:
    """The cells of every line that is not empty; a byte order mark, which MRPC's files have, is left out."""
    try:
        with path.open(encoding="utf-8-sig") as lines:
            yield from (line.rstrip("\n").split("\t") for line in lines if line.strip())
    except UnicodeDecodeError as error:
        raise UserError(
            f"The file '{path}' is not UTF-8 text ({error.reason} at byte {error.start}); convert it to UTF-8 first."
        ) from error
    except OSError as error:
        raise UserError(f"The file '{path}' cannot be read: {error.strerror}.") from error


def check_torn(path: Path, task: Task, n_torn: int, n_whole: int, positions: Sequence[int]) -> None:
    """A few torn rows are known of one official file; many mean that the file is something else."""
    if not n_whole and not n_torn:
        raise UserError(f"The file '{path}' has no rows.")
    if n_torn > MAX_TORN_SHARE * (n_torn + n_whole):
        raise UserError(
            f"{n_torn:,} of the {n_torn + n_whole:,} rows of '{path}' lack text or a label in one of the columns "
            f"{', '.join(str(position + 1) for position in sorted(positions))}, where {task.title} has them; the "
            "official files are tab-separated and unquoted."
        )
