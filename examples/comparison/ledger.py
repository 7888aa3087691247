"""The finished runs of a comparison, one line of JSON each, so that an interruption costs only the run it hits."""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from comparison.errors import UserError

LEDGER_FILE = "runs.jsonl"


@dataclass
class Run:
    """One training run and what came of it.

    Attributes:
        method: its name.
        size: rank or number of components, None without one.
        n_nodes: nodes per component, None without a mesh.
        learning_rate: its peak.
        seed: of data order and start.
        tuning: all metrics on the tuning split.
        test: all metrics on the test split, None unless this run is one of those reported.
        placement: where the adapter went, None for methods with one place only.
        trainable: parameters that were trained, new modules included.
        cpu_seconds: processor time of the training, with a start from data, without evaluation.
        curve: figures on the tuning split during training: step, cpu_seconds so far, all metrics.
        as_lora: of the LoRA that it was converted to: figures on the test split, parameters, bytes, seconds to convert.
        steps: optimiser steps taken; fewer than asked for if it stopped early.
        best_step: the step whose state was kept.
        seconds: of the training, with a start from data, without evaluation.
        step_seconds: median of a step.
        peak_memory: bytes, None where not measured.
    """

    method: str
    size: int | None
    n_nodes: int | None
    learning_rate: float
    seed: int
    tuning: dict[str, float]
    steps: int
    best_step: int
    seconds: float
    step_seconds: float
    peak_memory: int | None
    test: dict[str, float] | None = None
    placement: str | None = None
    trainable: int | None = None
    cpu_seconds: float | None = None
    curve: list[dict[str, float]] = field(default_factory=list)
    as_lora: dict[str, Any] | None = None

    @property
    def key(self) -> str:
        """What makes it this run and no other, under the settings of the ledger."""
        return run_key(self.method, self.size, self.n_nodes, self.learning_rate, self.seed, self.placement)


def run_key(
    method: str, size: int | None, n_nodes: int | None, learning_rate: float, seed: int, placement: str | None = None
) -> str:
    """The key of a run, finished or not."""
    place = f" placement={placement}" if placement else ""
    return f"{method} size={size} n_nodes={n_nodes}{place} learning_rate={learning_rate:g} seed={seed}"


class Ledger:
    """Append-only file: its first line holds the settings all its runs share, every other line something finished.

    Args:
        folder: where it lies.
        settings: everything that moves a figure and is the same for all runs.
        is_main: whether this process writes; the others only remember.

    Raises:
        UserError: if the folder holds runs under other settings; the message names the first one that differs.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], is_main: bool) -> None:
        self._path = folder / LEDGER_FILE
        self._is_main = is_main
        #: What was said of the base model when it was complete; None until then.
        self.base: dict[str, Any] | None = None
        self._runs: dict[str, Run] = {}
        settings = json.loads(json.dumps(settings))  # what it will look like when it is read back
        lines = self._lines()
        self._settings: dict[str, Any] | None = None if lines else settings
        if not lines:
            return
        self._check(lines[0]["settings"], settings)
        for line in lines[1:]:
            if "base" in line:
                self.base = line["base"]
            else:
                run = Run(**line["run"])
                self._runs[run.key] = run
        self.n_found = len(self._runs)

    n_found = 0

    def _lines(self) -> list[dict[str, Any]]:
        if not self._path.exists():
            return []
        content = self._path.read_bytes()
        # What follows the last line end was cut off in the middle of writing, perhaps in the middle of a character.
        complete, end, torn = content.rpartition(b"\n")
        if torn and self._is_main:
            with self._path.open("r+b") as file:
                file.truncate(len(complete) + len(end))
        try:
            # Not splitlines(), which also cuts at what JSON may hold as it is.
            lines = [json.loads(line) for line in complete.decode("utf-8").split("\n") if line]
            if not all(isinstance(line, dict) for line in lines):
                raise ValueError("a line is no object")
            if lines and "settings" not in lines[0]:
                raise ValueError("its first line holds no settings")
            return lines
        except ValueError as error:
            raise UserError(
                f"The file '{self._path}' is damaged ({error}); delete it to start anew, or the line to lose one run."
            ) from error

    def _check(self, old: dict[str, Any], new: dict[str, Any]) -> None:
        for name in [*new, *(name for name in old if name not in new)]:
            if old.get(name) != new.get(name):
                raise UserError(
                    f"The folder '{self._path.parent}' holds runs with {name} {_show(old.get(name))}, and this command "
                    f"has {name} {_show(new.get(name))}; give another --output_dir, or delete that folder."
                )

    def find(self, key: str) -> Run | None:
        """A finished run."""
        return self._runs.get(key)

    def add(self, run: Run) -> None:
        """Write a finished run; the same run again, now with its test figures, replaces the earlier line."""
        self._runs[run.key] = run
        self._write({"run": asdict(run)})

    def add_base(self, figures: dict[str, float]) -> None:
        """Write that the base model is complete, and its test figures where they mean something."""
        self.base = {"test": figures}
        self._write({"base": self.base})

    def _write(self, line: dict[str, Any]) -> None:
        if not self._is_main:
            return
        lines = [line] if self._settings is None else [{"settings": self._settings}, line]
        with self._path.open("ab") as file:
            file.write("".join(json.dumps(each, ensure_ascii=False) + "\n" for each in lines).encode())
            file.flush()
            os.fsync(file.fileno())
        self._settings = None


def _show(value: Any) -> str:
    return "not set" if value is None else json.dumps(value, ensure_ascii=False)
