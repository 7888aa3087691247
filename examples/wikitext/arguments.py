"""The options of `run_wikitext.py` beside those all comparisons share."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from comparison.errors import UserError
from comparison.options import ComparisonArguments, RunArguments, check, fill, option, parse, require_at_least

PRESETS = ("fair", "paper")
CONFIGS = Path(__file__).resolve().parent / "configs"


@dataclass
class ModelArguments:
    """Which model, and how long its base stage is."""

    model_name_or_path: str | None = option(
        None,
        "Hub id or local folder of a causal or masked language model (default: a small GPT-2, trained from nothing).",
    )
    architecture: str | None = option(
        None,
        "Model type of Transformers (gpt2, roberta, ...) to train from nothing at its default size, in place of the "
        "small GPT-2.",
    )
    preset: str = option(
        "fair",
        "Protocol: 'fair' searches the learning rate of every method at one parameter budget; 'paper' is the published "
        "one, for the models that have a file configs/paper-*.yaml.",
    )
    base_steps: int | None = option(
        None,
        "Steps of full training before the methods start: on Python's docstrings for a model trained from nothing "
        "(default 900, 240 with --smoke), on the training text for a given model (default 0).",
    )
    base_learning_rate: float | None = option(
        None,
        "Learning rate of the base stage (default 3e-3 for a model trained from nothing, 5e-5 for a given one).",
    )
    mlm_probability: float = option(0.15, "Share of the tokens a masked language model has to find.")


@dataclass
class DataArguments:
    """Which text. Without any of these options, the language reference that Python carries."""

    dataset_name: str | None = option(
        None, "Data set on the hub with the splits train, validation and, if possible, test."
    )
    dataset_config_name: str | None = option(None, "Configuration of that data set, such as wikitext-2-raw-v1.")
    text_column: str = option("text", "Column of that data set that holds the text.")
    train_file: str | None = option(None, "Local UTF-8 text to adapt to.")
    validation_file: str | None = option(
        None, "Local UTF-8 text to choose learning rates on; without it the last tenth of the training file is taken."
    )
    test_file: str | None = option(
        None, "Local UTF-8 text to report on; without it the second half of the validation file is held out."
    )
    block_size: int | None = option(None, "Tokens in a sequence (default 128, 64 with --smoke).")
    max_train_chars: int | None = option(None, "Adapt to no more than the beginning of the training text.")
    max_eval_chars: int | None = option(
        None, "Evaluate on no more than the beginning of the other texts: quicker, and not comparable to the whole."
    )


@dataclass(frozen=True)
class Scale:
    """Defaults that differ between the real run and the smoke run."""

    base_steps: int
    steps: int
    lr_trials: int
    batch_size: int
    block_size: int
    vocab_size: int
    hidden_size: int
    n_layers: int
    max_base_chars: int | None


FULL = Scale(
    base_steps=900,
    steps=120,
    lr_trials=3,
    batch_size=8,
    block_size=128,
    vocab_size=2048,
    hidden_size=128,
    n_layers=2,
    max_base_chars=None,
)
SMOKE = Scale(
    base_steps=240,
    steps=20,
    lr_trials=2,
    batch_size=8,
    block_size=64,
    vocab_size=512,
    hidden_size=64,
    n_layers=2,
    max_base_chars=200_000,
)


@dataclass(frozen=True)
class Arguments:
    """All options, with the defaults that depend on others filled in."""

    model: ModelArguments
    data: DataArguments
    comparison: ComparisonArguments
    run: RunArguments
    scale: Scale


KINDS = (ModelArguments, DataArguments, ComparisonArguments, RunArguments)


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """Read preset, config files and command line, fill in defaults, refuse what cannot be."""
    model, data, comparison, run = parse(KINDS, argv)
    preset = preset_file(model.preset, model.model_name_or_path)
    if preset is not None:
        files_given = any((data.train_file, data.validation_file, data.test_file))
        model, data, comparison, run = parse(KINDS, [str(preset), *argv])
        if files_given:  # a preset names its text too; files of one's own take its place
            data.dataset_name = data.dataset_config_name = None
    from_nothing = model.model_name_or_path is None
    scale = SMOKE if run.smoke else FULL
    fill(model, base_steps=scale.base_steps if from_nothing else 0)
    fill(model, base_learning_rate=3e-3 if from_nothing else 5e-5)
    fill(data, block_size=scale.block_size)
    fill(comparison, steps=scale.steps, batch_size=scale.batch_size, lr_trials=scale.lr_trials)
    check(comparison, run)
    require_at_least(
        block_size=(data.block_size, 4),
        base_steps=(model.base_steps, 0),
        max_train_chars=(data.max_train_chars, 1),
        max_eval_chars=(data.max_eval_chars, 1),
    )
    if from_nothing and model.base_steps == 0:
        raise UserError("--base_steps must be at least 1 for a model trained from nothing, got 0.")
    if not from_nothing and model.architecture is not None:
        raise UserError("Give either --architecture or --model_name_or_path, not both.")
    if not 0.0 < model.mlm_probability < 1.0:
        raise UserError(f"--mlm_probability must be between 0 and 1, got {model.mlm_probability}.")
    return Arguments(model, data, comparison, run, scale)


def preset_file(preset: str, model_name: str | None) -> Path | None:
    """The options of a preset for a model; None where the defaults are the preset."""
    if preset not in PRESETS:
        raise UserError(f"There is no preset '{preset}'; choose {' or '.join(PRESETS)}.")
    path = CONFIGS / f"{preset}-{Path(model_name or '').name}.yaml"
    if path.exists():
        return path
    if preset == "fair":
        return None
    known = ", ".join(sorted(path.stem.removeprefix("paper-") for path in CONFIGS.glob("paper-*.yaml")))
    raise UserError(f"The preset 'paper' needs --model_name_or_path with one of the paper's models ({known}).")
