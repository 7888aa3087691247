"""The configuration of an LReg adapter."""

import dataclasses
import math
import re
from dataclasses import InitVar, dataclass, field
from typing import Any, Literal, get_args

from peft import PeftConfig
from peft.utils.peft_types import PeftType

from ..core.checks import choice, flag, show, whole
from ..core.encoder import WEIGHTINGS, Weighting
from .layout import LAYOUTS, READOUTS
from .model_card import add_usage_to_saved_card
from .registration import METHOD, upstream_has_lreg


def _option(default: Any, text: str) -> Any:
    """A dataclass field whose description is written once: as metadata, and from there into the class docstring."""
    if isinstance(default, (dict, list)):
        return field(default_factory=type(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


GradeForm = Literal["additive", "composed"]
Preset = Literal["recommended", "paper"]
# What the recommended preset chooses besides the modules.
_CHOSEN = ("n_components", "weighting", "linear_term", "component_pattern", "node_pattern", "layers_to_transform")
#: Values of `init_weights` that ask for `initialize_lreg_weights`.
DATA_STARTS = ("pca", "gradient")


@dataclass
class LRegConfig(PeftConfig):
    """Configuration of an LReg adapter (Li, Cheng & Gu 2025).

    Every adapted module f gets a shortcut: y = f(x) + sum_ij psi_ij(u_i) c_ij with u = sigmoid(P x + b). It has
    `(in_features + 1) * n_components + n_components * n_nodes * out_features` trainable parameters with full
    weighting.

    Raises:
        ValueError: for values that cannot work, alone or together; the message says what to change.
        TypeError: for values of the wrong type.
    """

    n_components: int = _option(
        2, "d, the number of projected components: each gets its own one-dimensional mesh. At least 1."
    )
    preset: Preset = _option(
        "recommended",
        "What a configuration without `target_modules` stands for; `get_peft_model` fills it in for the model. "
        "'recommended': the recipe of `recommended_config` with its smallest shares: factored weighting and a linear "
        "term on all linear layers of the backbone and, of a language model, on the output head and the norm before "
        "it, and a start from data. 'paper': the placement of the paper for the task: the language model head, or the "
        "attention query and key projections for classification, with the fields as they are here.",
    )
    n_nodes: int | None = _option(
        None,
        "n, the degrees of freedom of one component: nodes of its mesh on [0, 1], at least 2. None: 8 in the "
        "recommended preset, else 2. "
        "(Not the number of trainable parameters, which is d * n * out_features and the projection.)",
    )
    weighting: Weighting = _option(
        "full",
        "How the basis functions are weighted. 'full': a vector c_ij per node, as in the paper, d n C parameters for "
        "C output features. 'reduced': the same functions without the d - 1 redundant directions (every component can "
        "carry the constant), (d (n - 1) + 1) C. 'factored': c_ij = s_ij v_i, a scalar function per component times "
        "one output vector, d n + d C.",
    )
    linear_term: bool = _option(
        False,
        "Factored weighting only: each component also passes on its coordinate before the sigmoid, z = P x + b: the "
        "shortcut is sum_i (z_i / 1.702 + s_i(sigmoid(z_i))) v_i. No further parameters; with constant profiles s this "
        "is LoRA with a bias.",
    )
    profile_mean: float = _option(
        1.0,
        "Factored weighting only: mean of the profiles s at the start. 1 lets the output vector learn a constant shift "
        "from the first step, which a language model head needs; 0 leaves it to the profile.",
    )
    profile_mean_pattern: dict[str, float] = _option(
        {}, "`profile_mean` for some modules: name, name ending or regular expression -> value."
    )
    target_modules: list[str] | str | None = _option(
        None,
        "Modules that get a shortcut: a list of names or name endings, a regular expression that matches whole names, "
        "or 'all-linear' (every linear layer but the output head). Linear and Conv1D layers, convolutions and whole "
        "blocks can be named. None: see `preset`.",
    )
    exclude_modules: list[str] | str | None = _option(
        None,
        "Modules that get none although `target_modules` matches them: names, name endings, or an expression.",
    )
    layers_to_transform: list[int] | int | None = _option(
        None, "Indices of the layers to adapt, if not all. Needs `target_modules` as a list of names."
    )
    layers_pattern: list[str] | str | None = _option(
        None, "Name of the module list the indices of `layers_to_transform` count in, e.g. 'layers' or 'h'."
    )
    modules_to_save: list[str] | None = _option(
        None, "Modules to train in full and save with the adapter, e.g. a new classification head."
    )
    component_pattern: dict[str, int] = _option(
        {}, "`n_components` for some modules: name, name ending or regular expression -> value."
    )
    node_pattern: dict[str, int] = _option(
        {}, "`n_nodes` for some modules: name, name ending or regular expression -> value."
    )
    feature_sizes: dict[str, tuple[int, int]] = _option(
        {},
        "Sizes (in_features, out_features) of modules they cannot be read off: name, name ending or regular "
        "expression -> pair.",
    )
    layout: dict[str, str] | str | None = _option(
        None,
        "How input and output of the adapted modules are laid out: 'channels_first' [batch, features, *space], "
        "'tokens' [..., features], 'grid' (tokens of a square image or channels first, of whatever number: the "
        "shortcut is averaged over the image), 'vector' [batch, features]. One word for all modules, or a dictionary "
        "from name, name ending or regular expression to word. None infers it from the shapes of each forward pass.",
    )
    readout: dict[str, str] | str | None = _option(
        None,
        "What a shortcut reads of an input with several positions if the module makes one vector of them: 'first' (the "
        "class token) or 'mean' (the mean of the features over all positions, padding included). One word for all "
        "modules, or a dictionary as for `layout`. None: the first token; for images it must be said.",
    )
    feature_source: dict[str, str] = _option(
        {},
        "Another module whose output a shortcut reads in place of its own module's input: name, name ending or regular "
        "expression of the adapted module -> name of the other one, which must run before it in every forward pass. "
        "All adapters of a module have one source.",
    )
    init_weights: bool | Literal["pca", "gradient"] = _option(
        True,
        "True: zero coefficients, so that the adapted model starts exactly as the base model, a random projection and "
        "uniform meshes. 'pca' or 'gradient': the same, and a promise to call `initialize_lreg_weights(model, "
        "dataloader)`, which fits projections and meshes to the data. False: random coefficients, which only tests "
        "want.",
    )
    dropout: float = _option(
        0.0,
        "Probability with which every basis function of every row is left out while the adapter trains, the others "
        "scaled up by 1 / (1 - dropout). Inference is not changed. Fits that solve for the coefficients do without.",
    )
    train_projection: bool = _option(True, "Train P and b. False keeps them as initialised.")
    base_width: int | None = _option(
        None,
        "For inputs wider than this P is stored times in_features / base_width, so that a step of Adam changes "
        "z = P x + b by as much as at that width, and a learning rate that is good for a narrow model is good for a "
        "wide one. None: P is stored as it is. The recommended configuration has 256.",
    )
    backbone_eval: bool = _option(
        False,
        "Put the frozen model in eval mode while the adapter trains, as the paper does: no dropout, and no gradient "
        "checkpointing, which needs train mode. Adapters and `modules_to_save` stay in train mode. Acts in `train()` "
        "of the PeftModel. With False dropout acts as with LoRA; batch norms of the frozen model keep their statistics "
        "either way.",
    )
    curvature_weight: float = _option(
        0.0,
        "Weight of the L1 penalty on the curvature of the coefficients along the mesh. `LRegCallback` adds it to the "
        "training loss; in a loop of your own add `lreg_peft.curvature_penalty(model)` to the loss.",
    )
    fused_loss: bool = _option(
        False,
        "With a shortcut on the output layer of a language model: compute the training loss in chunks, without a "
        "tensor of [batch, length, vocabulary], to save memory. While the model trains with labels, `output.logits` is "
        "None. The first batch is compared with the model's own loss; a model that changes its logits or weights its "
        "loss is refused.",
    )
    previous_grades: list[str] = _option(
        [],
        "Names of the adapters that this one stands on, first grade first; `add_grade` sets it. Activating the adapter "
        "adds their shortcuts too, frozen.",
    )
    grade_form: GradeForm = _option(
        "additive",
        "What the encoder of a grade reads: 'additive' the features x of the module, 'composed' x and the basis "
        "functions of the last previous grade at that module, whose K = d n values widen P to [components, "
        "in_features + K].",
    )

    # Never None: PEFT takes that for a reason to save the output embedding next to an adapter that targets it. The file
    # would grow from 0.8 MB to 155 MB on GPT-2, with weights that did not change.
    trainable_token_indices: dict[str, list[int]] | list[int] = _option(
        {},
        "Token ids whose rows of the input embedding are trained and saved with the adapter, for example of new "
        "tokens: a list, or a dictionary of lists by the name of the embedding.",
    )
    target_parameters: InitVar[Any] = None
    r: InitVar[Any] = None
    lora_alpha: InitVar[Any] = None
    lora_dropout: InitVar[Any] = None
    # What `n_nodes`, `node_pattern` and `weighting` were called in the files of versions before 0.2.
    dof: InitVar[Any] = None
    dof_pattern: InitVar[Any] = None
    head: InitVar[Any] = None

    def __post_init__(  # also called to check again
        self,
        target_parameters: Any = None,  # noqa: RUF033
        r: Any = None,  # noqa: RUF033
        lora_alpha: Any = None,  # noqa: RUF033
        lora_dropout: Any = None,  # noqa: RUF033
        dof: Any = None,  # noqa: RUF033
        dof_pattern: Any = None,  # noqa: RUF033
        head: Any = None,  # noqa: RUF033
    ) -> None:
        self.n_nodes = self.n_nodes if dof is None else dof
        self.node_pattern = self.node_pattern if dof_pattern is None else dof_pattern
        self.weighting = self.weighting if head is None else head
        for name, value, advice in (
            ("r", r, "LoRA's rank: n_components plays its part, or recommended_config(model, budget='lora:8')"),
            ("lora_alpha", lora_alpha, "LoRA's scaling, which shortcuts do not have: set the learning rate"),
            ("lora_dropout", lora_dropout, "LoRA's: write dropout="),
        ):
            if value is not None:
                raise TypeError(f"{name}={value!r} is {advice}.")
        if self.task_type is not None and "IMAGE" in str(self.task_type).upper():
            raise ValueError(
                f"PEFT knows no task_type {self.task_type!r}. For an image classifier leave task_type out, and name a "
                "new classification head that is to be trained in full: LRegConfig(modules_to_save=['classifier'])."
            )
        super().__post_init__()
        if target_parameters:
            raise ValueError(
                f"target_parameters={target_parameters!r} names weights, and a shortcut stands beside a module with an "
                "input and an output: name the module that holds them in target_modules, such as 'experts' or 'mlp'."
            )
        if upstream_has_lreg():
            raise RuntimeError(
                "this version of PEFT ships its own LREG method. Use peft.LRegConfig instead of lreg_peft.LRegConfig, "
                "or install an earlier PEFT."
            )
        self.peft_type = PeftType[METHOD.upper()]
        whole("n_components", self.n_components, 1)
        choice("preset", self.preset, get_args(Preset))
        whole("n_nodes", self.n_nodes, 2, optional=True)
        whole("base_width", self.base_width, 1, optional=True)
        if self.n_nodes is None and (self.target_modules is not None or self.preset == "paper"):
            self.n_nodes = 2
        if not isinstance(self.weighting, str) or self.weighting not in WEIGHTINGS:
            raise ValueError(f"weighting must be one of {', '.join(WEIGHTINGS)}, got {self.weighting!r}.")
        self._check_targets()
        self._check_patterns()
        if not isinstance(self.init_weights, (bool, str)) or self.init_weights not in (True, False, *DATA_STARTS):
            raise ValueError(
                f"init_weights must be True, False, {' or '.join(map(repr, DATA_STARTS))}, got {self.init_weights!r}."
            )
        for name in ("linear_term", "train_projection", "backbone_eval", "fused_loss", "inference_mode"):
            flag(name, getattr(self, name))
        self._check_profile()
        self._check_dropout()
        self._check_tokens()
        self._check_curvature_weight()
        self._check_grades()
        self._check_preset()

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As in PEFT; a model card that lies in the folder already also says how to load the adapter."""
        super().save_pretrained(save_directory, **kwargs)
        add_usage_to_saved_card(save_directory, self)

    def is_given(self, name: str) -> bool:
        """Whether a field has another value than its default."""
        (default,) = (item.default for item in dataclasses.fields(self) if item.name == name)
        return getattr(self, name) not in (default, {})

    def _check_preset(self) -> None:
        if self.target_modules is not None or self.preset == "paper":
            return
        given = [name for name in _CHOSEN if self.is_given(name)]
        if given:
            raise ValueError(
                f"{given[0]}={getattr(self, given[0])!r} needs target_modules, or preset='paper': without them the "
                "recommended preset chooses modules, components and weighting. recommended_config(model, budget=...) "
                "sizes it to a budget."
            )

    def _check_targets(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, str):
                _check_expression(name, value)
                continue
            setattr(self, name, _as_names(name, value))
        if self.modules_to_save is not None:
            self.modules_to_save = _as_names("modules_to_save", self.modules_to_save)
            both = sorted(set(self.modules_to_save) & set(_names(self.target_modules)))
            if both and self.inference_mode:
                # A saved configuration, perhaps one in which PEFT wrote down "all-linear": it passes these over.
                self.target_modules = [name for name in _names(self.target_modules) if name not in both]
            elif both:
                raise ValueError(
                    f"{both} stand in both target_modules and modules_to_save. A module either keeps its weights and "
                    "gets a shortcut (target_modules) or is trained in full (modules_to_save): remove it from one."
                )
        self._check_layers()
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ValueError(
                "layers_to_transform needs target_modules as a list of names, got "
                f"target_modules={self.target_modules!r}. Give a list, or put the layer numbers into the expression."
            )
        if isinstance(self.layers_pattern, str):
            _check_expression("layers_pattern", self.layers_pattern)
        elif self.layers_pattern is not None:
            self.layers_pattern = _as_names("layers_pattern", self.layers_pattern)
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                f"layers_pattern={self.layers_pattern!r} only has an effect together with layers_to_transform."
            )

    def _check_layers(self) -> None:
        layers = self.layers_to_transform
        if layers is None:
            return
        if not isinstance(layers, (list, tuple, set, frozenset, range)):
            whole("layers_to_transform", layers, 0)
            return
        self.layers_to_transform = sorted(layers) if isinstance(layers, (set, frozenset)) else list(layers)
        for layer in self.layers_to_transform:
            whole("layers_to_transform", layer, 0)
        if not self.layers_to_transform:
            raise ValueError("layers_to_transform must name a layer at least, got []. None adapts all layers.")

    def _check_patterns(self) -> None:
        for name in ("component_pattern", "node_pattern", "profile_mean_pattern", "feature_sizes", "feature_source"):
            if not isinstance(value := getattr(self, name), dict):
                raise TypeError(f"{name} must be a dictionary with a key for each module, got {value!r}.")
        for name, lowest in (("component_pattern", 1), ("node_pattern", 2)):
            for key, value in _items(name, getattr(self, name)):
                _check_expression(f"{name} key", key)
                whole(f"{name}[{key!r}]", value, lowest)
        sizes = {}
        for key, value in _items("feature_sizes", self.feature_sizes):
            _check_expression("feature_sizes key", key)
            if not isinstance(value, (tuple, list)) or len(value) != 2:
                raise ValueError(f"feature_sizes[{key!r}] must be a pair (in_features, out_features), got {value!r}.")
            for part, size in zip(("in_features", "out_features"), value, strict=True):
                whole(f"feature_sizes[{key!r}] {part}", size, 1)
            sizes[key] = (value[0], value[1])
        self.feature_sizes = sizes
        for name, words in (("layout", LAYOUTS), ("readout", READOUTS)):
            _check_words(name, getattr(self, name), words)
        for key, source in self.feature_source.items():
            _check_expression("feature_source key", key)
            if not isinstance(source, str) or not source:
                raise ValueError(f"feature_source[{key!r}] must be the name of a module, got {source!r}.")

    def _check_profile(self) -> None:
        if self.linear_term and self.weighting != "factored":
            raise ValueError(
                "linear_term=True needs weighting='factored', whose components have one output vector each to carry "
                f"it, got weighting={self.weighting!r}."
            )
        means = {"profile_mean": self.profile_mean}
        for key, value in _items("profile_mean_pattern", self.profile_mean_pattern):
            _check_expression("profile_mean_pattern key", key)
            means[f"profile_mean_pattern[{key!r}]"] = value
        for name, value in means.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number, got {value!r}.")
        if self.weighting != "factored" and (self.profile_mean != 1.0 or self.profile_mean_pattern):
            raise ValueError(
                f"profile_mean acts on the profiles of weighting='factored', got weighting={self.weighting!r}."
            )

    def _check_dropout(self) -> None:
        if isinstance(self.dropout, bool) or not isinstance(self.dropout, (int, float)):
            raise TypeError(f"dropout must be a number, got {self.dropout!r}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and less than 1, got {self.dropout}.")
        if self.dropout and self.fused_loss:
            raise ValueError(
                f"fused_loss=True computes the loss without dropout, got dropout={self.dropout}: leave one of them out."
            )

    def _check_tokens(self) -> None:
        given = {} if self.trainable_token_indices is None else self.trainable_token_indices
        for ids in given.values() if isinstance(given, dict) else [given]:
            whole = isinstance(ids, (list, tuple)) and all(type(item) is int and item >= 0 for item in ids)
            if not whole or not ids or len(set(ids)) < len(ids):
                raise ValueError(
                    "trainable_token_indices must be a list of different token ids (whole numbers from 0 on), or a "
                    f"dictionary of such lists by the name of an embedding, got {given!r}."
                )
        if isinstance(given, dict):
            self.trainable_token_indices = {key: list(ids) for key, ids in given.items()}
        else:
            self.trainable_token_indices = list(given)

    def _check_curvature_weight(self) -> None:
        weight = self.curvature_weight
        if isinstance(weight, bool) or not isinstance(weight, (int, float)):
            raise TypeError(f"curvature_weight must be a number, got {show(weight)}.")
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"curvature_weight must be finite and not negative, got {weight}.")
        if weight > 0 and max([self.n_nodes or 3, *self.node_pattern.values()]) == 2:
            raise ValueError(
                f"curvature_weight={weight} has nothing to act on: a mesh of n_nodes=2 has no interior node. "
                "Set n_nodes to 3 or more, or curvature_weight to 0."
            )

    def _check_grades(self) -> None:
        self.previous_grades = _as_names("previous_grades", self.previous_grades)
        if len(set(self.previous_grades)) < len(self.previous_grades):
            raise ValueError(f"previous_grades must name every adapter once, got {self.previous_grades}.")
        if self.grade_form not in get_args(GradeForm):
            raise ValueError(f"grade_form must be one of {', '.join(get_args(GradeForm))}, got {self.grade_form!r}.")
        if self.grade_form == "composed" and not self.previous_grades:
            raise ValueError(
                "grade_form='composed' reads the basis of a previous grade, and previous_grades is empty. "
                "add_grade(model, form='composed') sets both."
            )


def _items(name: str, value: Any) -> list[tuple[Any, Any]]:
    if not isinstance(value, dict):
        raise TypeError(f"{name} must be a dictionary with names or expressions as keys, got {show(value)}.")
    return list(value.items())


def _check_words(name: str, value: Any, words: tuple[str, ...]) -> None:
    """One of some words, a dictionary of them by expression, or None."""
    for key, word in value.items() if isinstance(value, dict) else [("", value)]:
        where = f"{name}[{key!r}]" if isinstance(value, dict) else name
        if isinstance(value, dict):
            _check_expression(f"{name} key", key)
        elif word is None:
            continue
        if word not in words:
            raise ValueError(f"{where} must be one of {', '.join(words)}, got {word!r}.")


def _check_expression(name: str, value: Any) -> None:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name} must be a non-empty string, got {show(value)}.")
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"{name}={value!r} is not a valid regular expression: {error}.") from None


def _as_names(name: str, value: Any) -> list[str]:
    if not isinstance(value, (list, tuple, set, frozenset)):
        raise TypeError(f"{name} must be a list of module names, got {show(value)}.")
    if not all(isinstance(item, str) and item for item in value):
        raise ValueError(f"{name} must hold non-empty module names, got {show(value)}.")
    return sorted(value) if isinstance(value, (set, frozenset)) else list(value)


def _names(value: list[str] | str | None) -> list[str]:
    return value if isinstance(value, list) else []


_options = "\n".join(
    f"        {item.name}: {item.metadata['help']}"
    for item in dataclasses.fields(LRegConfig)
    if item.name in LRegConfig.__annotations__
)
LRegConfig.__doc__ = f"{LRegConfig.__doc__}\n    Args:\n{_options}\n"
