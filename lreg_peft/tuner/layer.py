"""The shortcut around one module."""

import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks
from transformers.pytorch_utils import Conv1D

from ..core.basis import design_matrix
from ..core.coordinates import initial_projection, project_linear, without_autocast
from ..core.fused_loss import fused_cross_entropy
from ..core.mesh import check_nodes, uniform_nodes
from ..modules import is_compiling
from . import penalty, statistics
from .config import DATA_STARTS, LRegConfig
from .heads import HEADS, Encoded, Head
from .inference import add_factored
from .layout import ROW_BY_ROW, UNSAID, Layout, Reading, first_input, first_tensor
from .source import FeatureSource
from .storage import NodeDict, WeightDict

MERGE_REFUSED = (
    "LReg adapters cannot be merged: the shortcut is a nonlinear function of the input, so no weight of the base "
    "module can express it. Keep the adapter beside the model (it adds little to a forward pass), or call unload() "
    "to get the base model back without it."
)

# Standard deviation of the coefficients for init_weights=False.
_RANDOM_INIT_STD = 0.02

# Layers that no other layout fits, and that return a new tensor.
_ROW_BY_ROW = (nn.Linear, Conv1D, nn.LayerNorm)


def _held(holder: Any) -> Any:
    """The weight of an adapter, None if a wrapper holds it elsewhere."""
    weights = holder._parameters
    return weights["weight"] if "weight" in weights else None  # noqa: SIM401 - DeepSpeed gathers shards in `[]` alone


class InThread(threading.local):
    """Notes of one forward pass, for every thread by itself; copies and pickles start without."""

    #: Whether forward ran since the flag was last cleared: tells when a fused loss went past an output head.
    was_called = False
    #: Set for the time of a forward pass in which this output head may put off its logits: a function of the layer
    #: and its arguments that returns something in their place, or None.
    loss_request: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


class LRegLayer(nn.Module, BaseTunerLayer):
    """A module with one LReg shortcut per adapter: y = f(x) + sum_ij psi_ij(sigmoid(P x + b)) c_ij.

    f is any module whose first input is a float tensor with the features in its last dimension (or, channels first,
    in dimension 1) and whose output is such a tensor, or a tuple or ModelOutput that begins with one; the shortcut is
    added to that one. If a channels-first module changes the spatial size, the shortcut is average-pooled to it. If f
    turns a sequence into one vector, as the classification heads of encoders do, it reads the first position, or the
    mean of all of them (`layout.Layout`, and `layout` and `readout` of the configuration). With a `feature_source` x is
    not the input of f but the output of another module.

    Per adapter: `lreg_projection` P `[components, in_features]`, `lreg_projection_bias` b `[components]`,
    `lreg_coefficients` c `[components, dof, out_features]` (parameters) and `lreg_nodes` `[components, dof]` (an fp32
    buffer). The reduced head keeps c `[components, dof - 1, out_features]`, without the first node of each component,
    and one `lreg_constant` `[out_features]`; the factored head, c_ij = s_ij v_i, keeps `lreg_profile` s
    `[components, dof]` and `lreg_direction` v `[components, out_features]` (see `heads`). P of a composed grade has
    `in_features + K` columns, K the number of basis functions of the grade before it.

    Projection, sigmoid and local coordinate are computed in fp32 (fp64 for an fp64 model), the sum over the basis in
    the dtype of f's output.

    Source: Li, Cheng & Gu (2025), section 2.7. Unlike their published code, the encoder passes gradients on to P, b
    and x, and the mesh covers exactly the range (0, 1) of the coordinates.
    """

    adapter_layer_names = (
        "lreg_projection",
        "lreg_projection_bias",
        "lreg_coefficients",
        "lreg_constant",
        "lreg_profile",
        "lreg_direction",
    )
    other_param_names = (
        "lreg_nodes",
        "heads",
        "profile_mean",
        "curvature_weight",
        "lreg_statistics",
        "composed_on",
        "readings",
        "lreg_dropout",
    )

    def __init__(self, base_layer: nn.Module, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.lreg_projection = WeightDict()
        self.lreg_projection_bias = WeightDict()
        self.lreg_coefficients = WeightDict()
        self.lreg_constant = WeightDict()
        self.lreg_profile = WeightDict()
        self.lreg_direction = WeightDict()
        self.lreg_nodes = NodeDict()
        #: How each adapter weights its basis.
        self.heads: dict[str, Head] = {}
        #: Mean of the profiles of a factored head at its start.
        self.profile_mean: dict[str, float] = {}
        self.curvature_weight: dict[str, float] = {}
        #: How each adapter reads the module, as far as its configuration says.
        self.readings: dict[str, Reading] = {}
        #: The module whose output is read in place of this one's input.
        self.source: FeatureSource | None = None
        #: Probability of leaving out a basis function while an adapter trains.
        self.lreg_dropout: dict[str, float] = {}
        #: The adapter whose basis functions the encoder of a composed grade reads.
        self.composed_on: dict[str, str] = {}
        #: The adapters that a grade stands on, first grade first, for the grades of the whole model.
        self.previous_grades: dict[str, tuple[str, ...]] = {}
        # Attributes that PEFT declares on the class and would share between layers.
        self.frozen_peft_weight_names: dict[str, tuple[str, ...]] = {}
        self.merged_adapters: list[str] = []
        #: What forward and the hooks around it tell each other.
        self.in_thread = InThread()
        #: `InThread.was_called` of a compiled graph, which knows no threads.
        self.was_called = False
        #: Adapters whose configuration promises a start from data that has not been made yet.
        self.start_is_owed: set[str] = set()
        #: What a mesh update looks at, of the adapters that `track_statistics` asked for.
        self.lreg_statistics: dict[str, statistics.RunningStatistics] = {}
        #: Set for the time of a mixed batch: one adapter name per sample.
        self.batch_adapter_names: Sequence[str] | None = None
        # Last: from here on, attributes that the base has and this layer has not are those of the base.
        self.base_layer = base_layer
        parameters = inspect.signature(base_layer.forward).parameters
        self._input_name = next(iter(parameters), None)

    def update_layer(
        self,
        adapter_name: str,
        n_components: int,
        dof: int,
        config: LRegConfig,
        inference_mode: bool = False,
        *,
        profile_mean: float = 1.0,
        nodes: Tensor | None = None,
        reading: Reading = UNSAID,
    ) -> None:
        """Add an adapter, or replace the one of that name; on given nodes `[components, dof]` or uniform ones."""
        self.composed_on.pop(adapter_name, None)
        width = self.in_features
        if below := self.grade_below(config):
            self.composed_on[adapter_name] = below
            width += self.lreg_nodes[below].numel()
        for name in self.adapter_layer_names:
            if adapter_name in (weights := getattr(self, name)):
                del weights[adapter_name]
        self.heads[adapter_name] = head = HEADS[config.head_name]
        self.profile_mean[adapter_name] = profile_mean
        self.readings[adapter_name] = reading
        self.lreg_projection[adapter_name] = nn.Parameter(initial_projection(n_components, width))
        self.lreg_projection_bias[adapter_name] = nn.Parameter(torch.zeros(n_components))
        self.lreg_nodes[adapter_name] = uniform_nodes(n_components, dof) if nodes is None else nodes.detach().clone()
        start = head.nonlinear_start(self.lreg_nodes[adapter_name], profile_mean)
        for name, shape in head.shapes(n_components, dof, self.out_features).items():
            weight = start.get(name)
            if weight is None:
                weight = torch.zeros(shape)
                if not config.init_weights and weight.device.type != "meta":
                    weight.normal_(std=_RANDOM_INIT_STD)
            getattr(self, f"lreg_{name}")[adapter_name] = nn.Parameter(weight)
        self.lreg_statistics.pop(adapter_name, None)
        self.lreg_dropout[adapter_name] = config.dropout
        self.curvature_weight[adapter_name] = config.curvature_weight
        if config.curvature_weight > 0:
            penalty.watch(self)
        # PEFT re-enables requires_grad on every switch of adapters, except for the weights listed here.
        self.frozen_peft_weight_names.pop(adapter_name, None)
        if not config.train_projection:
            self.frozen_peft_weight_names[adapter_name] = ("lreg_projection", "lreg_projection_bias")
        self.start_is_owed.discard(adapter_name)
        if config.init_weights in DATA_STARTS and not inference_mode:
            self.start_is_owed.add(adapter_name)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def grade_below(self, config: LRegConfig) -> str | None:
        """The adapter that a composed grade of this configuration reads here; None if there is none, or if additive."""
        if config.grade_form != "composed":
            return None
        return next((name for name in reversed(config.previous_grades) if name in self.lreg_nodes), None)

    @property
    def stacked_adapters(self) -> list[str]:
        """The adapters whose shortcuts forward adds, in order: the active ones after the grades they stand on."""
        here: Any = self._modules["lreg_nodes"]
        return [name for name in self.active_stack if name in here._buffers]

    @property
    def active_stack(self) -> list[str]:
        """The active adapters of the model after the grades they stand on, in order, whether or not they are here."""
        active, previous = self.active_adapters, self.previous_grades
        if not previous:
            return list(dict.fromkeys(active))
        return list(dict.fromkeys(name for last in active for name in (*previous.get(last, ()), last)))

    def delete_adapter(self, adapter_name: str) -> None:
        """As in PEFT; with an active grade, the one before it becomes active.

        Raises:
            ValueError: if another grade stands on this adapter.
        """
        for grade, previous in self.previous_grades.items():
            if adapter_name in previous:
                raise ValueError(f"the grade {grade!r} stands on {adapter_name!r}: delete {grade!r} first.")
        own = self.previous_grades.pop(adapter_name, ())
        if own and self.active_adapters == [adapter_name]:
            self.set_adapter(own[-1])
        super().delete_adapter(adapter_name)

    def is_identity(self, adapter_name: str) -> bool:
        """Whether this adapter adds nothing yet."""
        return not any(weight.any() for weight in self.output_weights(adapter_name))

    def weights(self, adapter_name: str) -> dict[str, nn.Parameter]:
        """All weights of an adapter by name, without `lreg_`."""
        names = [name for name in self.adapter_layer_names if adapter_name in getattr(self, name)]
        return {name.removeprefix("lreg_"): getattr(self, name)[adapter_name] for name in names}

    def _head_weights(self, adapter_name: str) -> dict[str, nn.Parameter]:
        """Those of its head."""
        return {name: self._weight(f"lreg_{name}", adapter_name) for name in self.heads[adapter_name].weight_names}

    def _weight(self, name: str, adapter_name: str) -> Any:
        # By the short way: where one token comes at a time, looking up attributes of modules is what takes the time.
        return self._modules[name][adapter_name]  # type: ignore[index]

    def own_state(self, adapter_name: str) -> dict[str, Tensor]:
        """What an adapter consists of here, by its keys in the layer's `state_dict`."""
        return {
            key: value
            for key, value in self.state_dict().items()
            if key.startswith("lreg_") and key.removesuffix(".weight").partition(".")[2] == adapter_name
        }

    def output_weights(self, adapter_name: str) -> list[nn.Parameter]:
        """The parameters that the shortcut's value is linear in, zero at the start."""
        weights = self.weights(adapter_name)
        return [weights[name] for name in self.heads[adapter_name].linear_weights]

    @torch.no_grad()
    def set_encoder(self, adapter_name: str, projection: Tensor, bias: Tensor, nodes: Tensor) -> None:
        """Give an adapter that is still the identity another projection and mesh, in place.

        Args:
            adapter_name: which adapter.
            projection: P, `[components, in_features]`, wider for a composed grade.
            bias: b, `[components]`.
            nodes: `[components, dof]`.
        """
        check_nodes(nodes)
        self.lreg_projection[adapter_name].copy_(projection)
        self.lreg_projection_bias[adapter_name].copy_(bias)
        self.lreg_nodes[adapter_name].copy_(nodes)
        own = self.weights(adapter_name)
        for name, start in self.heads[adapter_name].nonlinear_start(nodes, self.profile_mean[adapter_name]).items():
            own[name].copy_(start)
        self.start_is_owed.discard(adapter_name)

    def register_input_hook(
        self, hook: Callable[[Tensor], None], adapter_name: str | None = None
    ) -> Callable[[], None]:
        """Call `hook` with the features `[..., in_features]` of every forward pass, as an adapter reads them (None: as
        the shapes say); returns what removes it."""

        def call(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            features = self.seen_features(args, kwargs)
            hook(self._layout(adapter_name, features, first_tensor(output)[0]).rows(features))

        return self.register_forward_hook(call, with_kwargs=True).remove

    def register_gradient_hook(self, hook: Callable[[Tensor, Tensor], None], adapter_name: str) -> Callable[[], None]:
        """Call `hook` in every backward pass with what P of an adapter multiplies, `[..., width]`, and the gradient of
        the loss in the module's output, `[..., out_features]`; returns what removes it.

        Both are in the positions of the output: where the module has fewer of these than its input, the former is
        averaged, so that the sum of their products is that over all positions of the input.
        """

        def call(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            hidden = first_tensor(output)[0]
            if hidden.requires_grad:
                features = self.seen_features(args, kwargs)
                layout = self._layout(adapter_name, features, hidden)
                with torch.no_grad():
                    rows = layout.pool(self.encoder_input(adapter_name, layout.rows(features)))
                hidden.register_hook(lambda gradient: hook(rows, layout.output_rows(gradient)))

        return self.register_forward_hook(call, with_kwargs=True).remove

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base module's output with the active shortcuts added to its first tensor."""
        own = self.__dict__  # without the detour by the module's own attributes
        if is_compiling():
            own["was_called"] = True
        else:
            here = own["in_thread"]
            here.was_called = True
            if here.loss_request is not None and (deferred := here.loss_request(self, args, kwargs)) is not None:
                return deferred
        output = own["_modules"]["base_layer"](*args, **kwargs)
        if self.disable_adapters:
            return output
        hidden, rebuild = first_tensor(output)
        adapters = self.stacked_adapters
        if not adapters and self.batch_adapter_names is None:
            return output
        features = self._features(args, kwargs)
        if self.batch_adapter_names is not None:
            return rebuild(self._add_per_sample(features, hidden, self.batch_adapter_names))
        for name in adapters:
            hidden = self._add_shortcut(name, features, hidden)
        return rebuild(hidden)

    def _add_shortcut(self, name: str, features: Tensor, hidden: Tensor) -> Tensor:
        """`hidden` plus one shortcut, in the memory of `hidden` where that is nobody else's."""
        if not torch.is_grad_enabled() and (total := self._add_without_gradients(name, features, hidden)) is not None:
            return total
        head, nodes = self.heads[name], self._weight("lreg_nodes", name)
        if self._drops(name):
            return hidden + self.shortcut(name, features, hidden)
        row_by_row = features.shape[-1:] == (self.in_features,) and hidden.shape == (
            *features.shape[:-1],
            self.out_features,
        )
        plain = row_by_row and (
            (type(self.base_layer) in _ROW_BY_ROW and self.readings.get(name, UNSAID) == UNSAID)
            or self._layout(name, features, hidden) == ROW_BY_ROW
        )
        if not (plain and head.design_is_faster(nodes)):
            return hidden + self.shortcut(name, features, hidden)
        with without_autocast(features.device.type):
            code = self.encode(name, features)  # [..., components]
            total = head.add(self._head_weights(name), nodes, code, hidden, in_place=self._output_is_new())
        self._observe(name, code, total)
        return total

    def _output_is_new(self) -> bool:
        """Whether nobody else holds the output: what other modules return may be their input or something they keep."""
        base: Any = self._modules["base_layer"]
        if type(base) not in _ROW_BY_ROW or base._forward_hooks or _global_forward_hooks:
            return False
        return "forward" not in base.__dict__  # a patch of the module may keep what it returns, as its hooks may

    def _add_without_gradients(self, name: str, features: Tensor, hidden: Tensor) -> Tensor | None:
        """`_add_shortcut` without gradients on the CPU; None where that is not the way.

        By short ways throughout: for one row, looking up attributes of modules takes longer than the arithmetic.
        """
        own: Any = self._modules
        slope = self.heads[name].slope
        if (
            slope is None
            or self.training
            or name in self.composed_on
            or self.readings.get(name, UNSAID) != UNSAID
            or not self._output_is_new()
        ):
            return None
        return add_factored(
            hidden,
            features,
            slope,
            _held(own["lreg_projection"]._modules[name]),
            _held(own["lreg_projection_bias"]._modules[name]),
            own["lreg_nodes"]._buffers[name],
            _held(own["lreg_profile"]._modules[name]),
            _held(own["lreg_direction"]._modules[name]),
        )

    def shortcut(self, adapter_name: str, features: Tensor, like: Tensor) -> Tensor:
        """The shortcut's value alone.

        Args:
            adapter_name: which adapter.
            features: input of the module, `[..., in_features]` or channels first.
            like: output of the base module; gives dtype and layout.

        Returns:
            A tensor of the shape and dtype of `like`.
        """
        layout = self._layout(adapter_name, features, like)
        rows = layout.rows(features)
        with without_autocast(features.device.type):
            code = self.encode(adapter_name, rows)  # [..., components]
            value = self._value_in(layout, adapter_name, code, like.dtype)  # [..., out_features]
        self._observe(adapter_name, code, value, layout)
        return layout.restore(value)

    def _value_in(self, layout: Layout, name: str, code: Encoded, dtype: torch.dtype) -> Tensor:
        """The value at the positions of the output."""
        if layout.shrinks:
            design = self.design(name, code)  # [batch, *space, K]
            if design.shape[-1] <= self.out_features:  # averaging is linear: the narrower of the two is averaged
                return layout.pool(self._thinned(name, design)).to(dtype) @ self.table(name).to(dtype)
        return layout.pool(self._value(name, code, dtype))

    def fused_loss(
        self,
        features: Tensor,
        targets: Tensor,
        normaliser: Tensor | float | None = None,
        *,
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """Cross-entropy of this module's output, with the active shortcuts, in chunks of rows.

        Args:
            features: `[n, in_features]`.
            targets: int64 `[n]`.
            normaliser: what the summed loss is divided by; None takes n.
            label_smoothing: as in `torch.nn.functional.cross_entropy`.

        Returns:
            A scalar; see `core.fused_loss`.
        """
        kind = features.device.type
        dtype, enabled = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)

        def autocast_base(rows: Tensor) -> Tensor:
            with torch.autocast(kind, dtype, enabled):
                return first_tensor(self.base_layer(rows))[0]

        base = autocast_base if enabled or type(self.base_layer) is not nn.Linear else self.base_layer

        designs, tables, watchers = [], [], []
        with torch.autocast(kind, enabled=False):
            for name in self.stacked_adapters:
                code = self.encode(name, features)  # [n, components]
                if name in self.lreg_statistics and not code.coords.requires_grad:
                    code.coords.requires_grad_()  # a mesh update wants this gradient even if P does not train
                if (observation := self._observe(name, code)) is not None:
                    watchers.append((observation.picked, observation.record))
                designs.append(self._thinned(name, self.design(name, code)))
                tables.append(self.table(name))
            design, table = torch.cat(designs, dim=-1), torch.cat(tables)
            return fused_cross_entropy(
                base,
                features,
                targets,
                design,
                table,
                normaliser=normaliser,
                label_smoothing=label_smoothing,
                watchers=watchers,
            )

    def encode(self, adapter_name: str, features: Tensor) -> Encoded:
        """z = P x + b and u = sigmoid(z): `[..., in_features]` -> `[..., components]` each, fp32 or fp64."""
        inputs = self.encoder_input(adapter_name, features)
        return Encoded.of(
            project_linear(
                inputs,
                self._weight("lreg_projection", adapter_name),
                self._weight("lreg_projection_bias", adapter_name),
            )
        )

    def coords(self, adapter_name: str, features: Tensor) -> Tensor:
        """u alone, see `encode`."""
        return self.encode(adapter_name, features).coords

    def encoder_input(self, adapter_name: str, features: Tensor) -> Tensor:
        """What P multiplies: the features x `[..., in_features]`, and the basis below for a composed grade."""
        below = self.composed_on.get(adapter_name)
        if below is None:
            return features
        basis = design_matrix(self.coords(below, features), self.lreg_nodes[below])
        return torch.cat((features.to(basis.dtype), basis), dim=-1)  # [..., in_features + K]

    def design(self, adapter_name: str, code: Encoded) -> Tensor:
        """What the rows of `table` are weighted by, `[..., K]`: the shortcut is `design @ table`, for every head."""
        return self.heads[adapter_name].design(
            self._head_weights(adapter_name), self._weight("lreg_nodes", adapter_name), code
        )

    def table(self, adapter_name: str) -> Tensor:
        """The parameters that the shortcut is linear in, as one matrix `[K, out_features]`; see `design`."""
        return self.heads[adapter_name].table(self._head_weights(adapter_name))

    @torch.no_grad()
    def set_table(self, adapter_name: str, table: Tensor) -> None:
        """Write `[K, out_features]`, in the order of `table`, into the weights it is stacked from, in place."""
        weights = self.output_weights(adapter_name)
        parts = table.split([weight.numel() // self.out_features for weight in weights])
        for weight, part in zip(weights, parts, strict=True):
            weight.copy_(part.view_as(weight))

    def _value(self, name: str, code: Encoded, dtype: torch.dtype) -> Tensor:
        """Weight the basis: `[..., components]` -> `[..., out_features]` in `dtype`."""
        if self._drops(name):
            return self._thinned(name, self.design(name, code)).to(dtype) @ self.table(name).to(dtype)
        return self.heads[name].value(self._head_weights(name), self._weight("lreg_nodes", name), code, dtype)

    @property
    def has_dropout(self) -> bool:
        """Whether dropout is at work in the shortcuts that forward adds."""
        return any(self._drops(name) for name in self.stacked_adapters)

    def _drops(self, name: str) -> bool:
        """Whether dropout is at work: only an adapter that trains has it, not a grade below."""
        return self.training and self.lreg_dropout.get(name, 0) > 0 and name in self.active_adapters

    def _thinned(self, name: str, design: Tensor) -> Tensor:
        """The design with dropout, if it is at work."""
        return F.dropout(design, self.lreg_dropout[name]) if self._drops(name) else design

    def _observe(
        self, name: str, code: Encoded, output: Tensor | None = None, layout: Layout = ROW_BY_ROW
    ) -> statistics.Observation | None:
        """In training, note down the statistics that somebody asked for.

        `output` is the shortcut's value `[..., out_features]` or a sum it is part of, in the positions of the output;
        without one the caller tells the observation what the backward pass sees.
        """
        observer = self.lreg_statistics.get(name)
        if observer is None or not (self.training and torch.is_grad_enabled()):
            return None
        head = partial(self._value_of_coords, name)
        observation = observer.observe(code.coords, self.nodal_parameter(name), self.lreg_nodes[name], head)
        if observation is not None and output is not None:
            observation.follow(output, layout.spread if layout.pools else None)
        return observation

    def _value_of_coords(self, name: str, coords: Tensor) -> Tensor:
        """The piecewise-linear part alone, as a function of the coordinates: what moving a mesh can change."""
        code = Encoded(torch.zeros_like(coords), coords)
        return self.heads[name].value(self._head_weights(name), self.lreg_nodes[name], code, coords.dtype)

    def nodal_coefficients(self, adapter_name: str) -> Tensor:
        """c of the paper, for every head: the values at the nodes, `[components, dof, out_features]`."""
        return self.heads[adapter_name].nodal_coefficients(self._head_weights(adapter_name))

    def nodal_parameter(self, adapter_name: str) -> nn.Parameter:
        """The parameter with one entry per node: the profile s of the factored head, else the coefficients c."""
        return getattr(self, f"lreg_{self.heads[adapter_name].nodal_weight}")[adapter_name]  # type: ignore[no-any-return]

    def curvature_terms(self) -> Iterator[penalty.CurvatureTerm]:
        """One for every active adapter with a curvature penalty."""
        for name in self.active_adapters:
            if self.curvature_weight.get(name, 0) > 0:
                yield penalty.CurvatureTerm(
                    self.curvature_weight[name],
                    self.lreg_nodes[name],
                    self.nodal_parameter(name),
                    self.heads[name].to_nodes,
                )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if any(weight > 0 for weight in self.curvature_weight.values()):
            penalty.watch(self)  # a copy or an unpickled layer is not known to the optimiser hook yet
        if self.lreg_statistics:
            statistics.watch(self)

    def _add_per_sample(self, features: Tensor, hidden: Tensor, names: Sequence[str]) -> Tensor:
        batch = features.shape[0]
        if batch % len(names):
            raise ValueError(
                f"adapter_names has {len(names)} entries, but a batch of {batch} reached "
                f"{type(self.get_base_layer()).__name__}; it must hold one name per sample."
            )
        # Beam search repeats every sample in place.
        expanded = [name for name in names for _ in range(batch // len(names))]
        result = hidden.clone()
        for name in dict.fromkeys(expanded):
            rows = torch.tensor([i for i, item in enumerate(expanded) if item == name], device=hidden.device)
            for adapter in (*self.previous_grades.get(name, ()), name):
                if adapter in self.lreg_nodes:  # not "__base__", nor an adapter that does not cover this module
                    result[rows] += self.shortcut(adapter, features[rows], hidden[rows])
        return result

    def _features(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """What the shortcuts read in the forward pass that is running."""
        if self.source is not None:
            keep = self.training or torch.is_grad_enabled() or bool(self._forward_hooks)
            return self.source.read(args, kwargs, keep)
        return self._own_input(args, kwargs)

    def seen_features(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """What the shortcuts read, for hooks of this module."""
        return self._own_input(args, kwargs) if self.source is None else self.source.peek()

    def _own_input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        return first_input(args, kwargs, self._input_name, self.get_base_layer)

    def _layout(self, adapter_name: str | None, features: Tensor, output: Tensor) -> Layout:
        base, reading = self.get_base_layer(), self.readings.get(adapter_name or "", UNSAID)
        try:
            return Layout.of(base, self.in_features, self.out_features, features.shape, output.shape, reading)
        except ValueError as error:
            raise ValueError(
                misfit(type(base).__name__, (self.in_features, self.out_features), features.shape, output.shape, error)
            ) from None

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None, like: Tensor | None = None
    ) -> None:
        # Not PEFT's version: that one would also round the nodes to the dtype of the base module, and reads device
        # and dtype off `weight`, which a whole block does not have. `like` stands in for a base without parameters.
        source = next((p for p in self.base_layer.parameters() if p.device.type != "meta"), like)
        device = device or (None if source is None else source.device)
        dtype = getattr(self.get_base_layer(), "compute_dtype", None)  # of a quantised layer
        if dtype is None and source is not None and source.is_floating_point() and source.dtype.itemsize > 1:
            dtype = source.dtype
        for name in self.adapter_layer_names:
            weights = getattr(self, name)
            if adapter_name in weights and weights[adapter_name].device.type != "meta":
                weights[adapter_name] = weights[adapter_name].to(device=device, dtype=dtype)
        if adapter_name in self.lreg_nodes and self.lreg_nodes[adapter_name].device.type != "meta":
            self.lreg_nodes[adapter_name] = self.lreg_nodes[adapter_name].to(device=device)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse: the shortcut is nonlinear."""
        raise NotImplementedError(MERGE_REFUSED)

    def unmerge(self) -> None:
        """Refuse: nothing was ever merged."""
        raise NotImplementedError(MERGE_REFUSED)

    # Code around a wrapped block goes on asking it for what the block has: RoBERTa's get_output_embeddings() returns
    # `lm_head.decoder`, weight tying assigns to `lm_head.weight`.

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Private names are left out: accelerate deletes the hook attributes that it finds.
            # torch's transformer layers look at this one of their attention.
            if name == "base_layer" or (name.startswith("_") and name != "_qkv_same_embed_dim"):
                raise
            return getattr(self.base_layer, name)

    def __setattr__(self, name: str, value: Any) -> None:
        base = self.__dict__.get("_modules", {}).get("base_layer")
        if (
            base is not None
            and name not in self.__dict__
            and any(name in state for state in (base._parameters, base._buffers, base._modules))
        ):
            setattr(base, name, value)
        else:
            super().__setattr__(name, value)

    def __repr__(self) -> str:
        return f"lreg_peft.{super().__repr__()}"

    def extra_repr(self) -> str:
        """Sizes, as `print(model)` shows them."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


class LRegLinear(LRegLayer):
    """`LRegLayer` around a layer that is linear.

    PEFT recognises adapted linear layers by "Linear" in the class name when a further adapter says "all-linear".
    """


def misfit(kind: str, sizes: tuple[int, int], features: Sequence[int], output: Sequence[int], reason: object) -> str:
    """Why a shortcut does not fit: the sizes it has, the shapes that were seen, the reason from `Layout.of`."""
    return (
        f"a shortcut from {sizes[0]} to {sizes[1]} features does not fit around this {kind}, which takes "
        f"{tuple(features)} to {tuple(output)}: {reason}."
    )


def wrap(module: nn.Module, in_features: int, out_features: int, *, linear: bool) -> LRegLayer:
    """Put a module into the layer class that fits it; it has no adapter yet."""
    return (LRegLinear if linear else LRegLayer)(module, in_features, out_features)


def layers_with_adapter(model: nn.Module, adapter_name: str) -> dict[str, LRegLayer]:
    """The layers of a model that carry an adapter, by name.

    Raises:
        ValueError: if there are none.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LRegLayer) and adapter_name in module.lreg_nodes
    }
    if not layers:
        raise ValueError(
            f"the model has no LReg adapter called {adapter_name!r}: call get_peft_model(model, LRegConfig(...)) first."
        )
    return layers


def check_saved_nodes(name: str, nodes: Tensor) -> None:
    """Raise a `ValueError` naming the file entry unless `nodes` is a mesh on [0, 1]."""
    try:
        check_nodes(nodes)
    except ValueError as error:
        raise ValueError(f"the adapter file is damaged: {name}: {error}") from None
    if nodes.device.type != "meta" and (nodes[:, 0].ne(0).any() or nodes[:, -1].ne(1).any()):
        raise ValueError(f"the adapter file is damaged: {name}: every mesh must span [0, 1].")
