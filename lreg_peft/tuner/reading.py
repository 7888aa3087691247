"""What the shortcut around a module reads, its sizes, and whether they fit what was seen."""

import difflib
from collections.abc import Iterator, Mapping

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .config import LRegConfig
from .example_run import Seen
from .layer import LRegLayer, misfit
from .layout import Layout, LayoutHints, Reading
from .patterns import by_pattern
from .sizes import feature_sizes, source_width


def reading_of(name: str, config: LRegConfig) -> Reading:
    """How the module `name` is read, as far as the configuration says."""
    words: list[str | None] = []
    for option in ("layout", "readout"):
        value = getattr(config, option)
        words.append(by_pattern(option, name, config, None) if isinstance(value, dict) else value)
    return Reading(words[0], words[1])


def source_of(model: nn.Module, name: str, config: LRegConfig) -> str | None:
    """Full name of the module whose output the shortcut around `name` reads; None if it reads the input of `name`.

    Raises:
        ValueError: if the model has no such module, or several, or one that cannot have run by then.
    """
    wanted = by_pattern("feature_source", name, config, None)
    if wanted is None:
        return None
    # A block that carries a shortcut answers to the names of what lies inside it.
    names = list(dict.fromkeys(path.replace(".base_layer", "") for path, _ in model.named_modules() if path))
    found = [path for path in names if path == wanted] or [path for path in names if path.endswith(f".{wanted}")]
    if len(found) != 1:
        close = difflib.get_close_matches(wanted, names, n=3)
        raise ValueError(
            f"feature_source of {name!r} must name one module, and {wanted!r} names "
            + (f"{len(found)}: {', '.join(map(repr, found[:4]))}." if found else "none.")
            + (f" Did you mean {', '.join(map(repr, close))}?" if close and not found else "")
        )
    if name == found[0] or name.startswith(f"{found[0]}."):
        raise ValueError(
            f"feature_source of {name!r} is {found[0]!r}, which has not run before it: it contains it. Name a module "
            "that is over when it begins."
        )
    return found[0]


def sizes_of_shortcut(model: nn.Module, name: str, module: nn.Module, config: LRegConfig) -> tuple[int, int]:
    """`(in_features, out_features)` of the shortcut around a module, whose input may be another module's output."""
    source = source_of(model, name, config)
    if source is None or by_pattern("feature_sizes", name, config, None) is not None:
        return feature_sizes(name, module, config)
    other = model.get_submodule(source)
    if isinstance(other, BaseTunerLayer):
        other = other.get_base_layer()
    return source_width(source, other, config), feature_sizes(name, module, config)[1]


def check_same_reading(module: nn.Module, name: str, sizes: tuple[int, int], source: str | None) -> None:
    """Adapters of one module share its sizes and what they read."""
    if not isinstance(module, LRegLayer) or not len(module.lreg_encoder):
        return
    own = (module.in_features, module.out_features), module.source and module.source.name
    if own != (sizes, source):
        there = ", ".join(map(repr, module.lreg_encoder))
        raise ValueError(
            f"{name!r} has the adapters {there}, which read {own[1] or 'its own input'} with sizes {own[0]}; another "
            f"one cannot read {source or 'its own input'} with sizes {sizes}. Give it the feature_source and "
            "feature_sizes of the others."
        )


def misfits(
    model: nn.Module, config: LRegConfig, modules: Mapping[str, nn.Module], seen: Mapping[str, Seen]
) -> Iterator[str]:
    """Why shortcuts do not fit what was seen in a run on example inputs, one sentence for each that does not."""
    for name, module in modules.items():
        text = _misfit(model, config, name, module, seen[name], source_of(model, name, config))
        if text is not None:
            yield text


def _misfit(
    model: nn.Module, config: LRegConfig, name: str, module: nn.Module, seen: Seen, source: str | None
) -> str | None:
    """Why a shortcut around a module does not fit what was seen; None if it does."""
    kind = type(module).__name__
    if seen.n_early:
        return (
            f"{name!r}: its feature_source {source!r} has not run before it in the forward pass. Name a module that "
            "runs once, and before, in every pass."
        )
    if seen.error is not None:
        return f"{name!r}: {seen.error}."
    if not seen.shapes:
        return f"{name!r} ({kind}): the model does not call it on these inputs."
    if not seen.is_read:
        return (
            f"{name!r} ({kind}): nothing that the model returns on these inputs depends on the first tensor of its "
            "output, so that a shortcut there would have no effect. Target a module whose output is read."
        )
    try:
        sizes = sizes_of_shortcut(model, name, module, config)
    except ValueError:
        (features, output), *_ = seen.shapes
        return (
            f"{name!r}: cannot read the feature sizes of this {kind}, which takes {features} to {output}. Give them: "
            f"LRegConfig(feature_sizes={{{name!r}: (in_features, out_features)}})."
        )
    for features, output in seen.shapes:
        try:
            Layout.of(LayoutHints(module, *sizes), features, output, reading_of(name, config))
        except ValueError as error:
            return f"{name!r}: {misfit(kind, sizes, features, output, error)}"
    return None
