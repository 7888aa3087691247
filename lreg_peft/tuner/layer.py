"""The shortcut around one module: y = f(x) + B(curve(A(x)))."""

import inspect
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..core.encoder import LagrangeEncoder
from ..core.fused_loss import fused_cross_entropy
from ..core.linear_maps import Coefficients, Projection
from ..modules import is_compiling
from .config import DATA_STARTS, LRegConfig
from .layout import ROW_BY_ROW, UNSAID, Layout, LayoutHints, Reading, first_input, first_tensor
from .source import FeatureSource

MERGE_REFUSED = (
    "LReg adapters cannot be merged: the shortcut is a nonlinear function of the input, so no weight of the base "
    "module can express it. lreg_peft.save_as_lora(path, model, dataloader) writes the closest LoRA, which can be "
    "merged; or keep the adapter beside the model, or call unload() to get the base model back without it."
)

# Standard deviation of the coefficients for init_weights=False.
_RANDOM_INIT_STD = 0.02

# Layers that no other layout fits.
_ROW_BY_ROW = (nn.Linear, Conv1D, nn.LayerNorm)


class ThisThread(threading.local):
    """What the forward pass that runs in this thread is about."""

    #: One adapter name per sample, in a mixed batch.
    adapter_names: Sequence[str] | None = None
    #: Whether an output layer ran since this was last cleared: tells when a loss of others went past it.
    output_layer_ran = False
    #: Takes the input of an output layer whose loss is computed in chunks; see `hooks.fused_loss`.
    fused_pass: Any = None


this_thread = ThisThread()


class LRegLayer(nn.Module, BaseTunerLayer):
    """A module with one LReg shortcut per adapter: y = f(x) + sum_ij psi_ij(sigmoid(P x + b)) c_ij.

    f is any module whose first input is a float tensor with the features in its last dimension (or, channels first,
    in dimension 1) and whose output is such a tensor, or a tuple or ModelOutput that begins with one; the shortcut is
    added to that one. If a channels-first module changes the spatial size, the shortcut is average-pooled to it. If f
    turns a sequence into one vector, as the classification heads of encoders do, it reads the first position, or the
    mean of all of them (`layout.Layout`, and `layout` and `readout` of the configuration). With a `feature_source` x is
    not the input of f but the output of another module.

    Every adapter consists of three modules: `lreg_projection` A, an `nn.Linear` with P `[d, in_features]` and b;
    `lreg_encoder`, the curve, with the nodes `[d, n]` (a buffer in fp32) and, for a factored weighting, the profiles
    `[d, n]` (its `weight`); `lreg_coefficients` B, an `nn.Linear` without bias whose weight `[out_features, K]` is zero
    at the start. P of a composed grade has `in_features + d n` columns, d n the number of basis functions of the grade
    below.

    A and the curve are computed in fp32 (fp64 for an fp64 model), the sum in the dtype of f's output.

    Source: Li, Cheng & Gu (2025), section 2.7. Unlike their published code, the encoder passes gradients on to P, b
    and x, and the mesh covers exactly the range (0, 1) of the coordinates.
    """

    adapter_layer_names = ("lreg_projection", "lreg_encoder", "lreg_coefficients")
    other_param_names = ("lreg_dropout", "scaling", "curvature_weight", "composed_on", "readings")

    def __init__(self, base_layer: nn.Module, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.lreg_projection = nn.ModuleDict()
        self.lreg_encoder = nn.ModuleDict()
        self.lreg_coefficients = nn.ModuleDict()
        #: Probability of leaving out a basis function while an adapter trains.
        self.lreg_dropout: dict[str, float] = {}
        #: Factor of each adapter's shortcut, see `set_scale`.
        self.scaling: dict[str, float] = {}
        self.curvature_weight: dict[str, float] = {}
        #: How each adapter reads the module, as far as its configuration says.
        self.readings: dict[str, Reading] = {}
        #: The module whose output is read in place of this one's input.
        self.source: FeatureSource | None = None
        #: The adapter whose basis functions the encoder of a composed grade reads.
        self.composed_on: dict[str, str] = {}
        #: The adapters that a grade stands on, first grade first, for the grades of the whole model.
        self.previous_grades: dict[str, tuple[str, ...]] = {}
        #: Adapters whose configuration asks for a start from data that has not been made yet.
        self.needs_data_init: set[str] = set()
        #: Whether this is the output layer of a language model, and whether a compiled graph has it, which knows no
        #: threads.
        self.is_output_layer = self.ran_compiled = False
        # Attributes that PEFT declares on the class and would share between layers.
        self.frozen_peft_weight_names: dict[str, tuple[str, ...]] = {}
        self.merged_adapters: list[str] = []
        self.cast_input_dtype_enabled = True
        # Last: from here on, attributes that the base has and this layer has not are those of the base.
        self.base_layer = base_layer
        own = self.get_base_layer()
        self._input_name = next(iter(inspect.signature(base_layer.forward).parameters), None)
        self._is_row_by_row = type(own) in _ROW_BY_ROW  # a subclass may read the first token alone
        self._hints = LayoutHints(own, in_features, out_features)

    def update_layer(
        self,
        adapter_name: str,
        n_components: int,
        n_nodes: int,
        config: LRegConfig,
        inference_mode: bool = False,
        *,
        profile_mean: float = 1.0,
        nodes: Tensor | None = None,
        reading: Reading = UNSAID,
    ) -> None:
        """Add an adapter, or replace the one of that name; on given nodes `[components, n_nodes]` or uniform ones."""
        self.composed_on.pop(adapter_name, None)
        width = self.in_features
        if below := self.grade_below(config):
            self.composed_on[adapter_name] = below
            width += self.lreg_encoder[below].nodes.numel()  # type: ignore[union-attr,operator]
        encoder = LagrangeEncoder(
            n_components,
            n_nodes,
            config.weighting,
            linear_term=config.linear_term,
            profile_mean=profile_mean,
            nodes=nodes,
        )
        coefficients = Coefficients(encoder.n_functions, self.out_features)
        if not config.init_weights:
            nn.init.normal_(coefficients.weight, std=_RANDOM_INIT_STD)
        self.lreg_projection[adapter_name] = Projection(width, n_components, config.base_width)
        self.lreg_encoder[adapter_name] = encoder
        self.lreg_coefficients[adapter_name] = coefficients
        self.lreg_dropout[adapter_name] = config.dropout
        self.scaling[adapter_name] = 1.0
        self.curvature_weight[adapter_name] = config.curvature_weight
        self.readings[adapter_name] = reading
        # PEFT re-enables requires_grad on every switch of adapters, except for the modules listed here.
        self.frozen_peft_weight_names.pop(adapter_name, None)
        if not config.train_projection:
            self.frozen_peft_weight_names[adapter_name] = ("lreg_projection",)
        self.needs_data_init.discard(adapter_name)
        if config.init_weights in DATA_STARTS and not inference_mode:
            self.needs_data_init.add(adapter_name)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    # Adapters on adapters

    def grade_below(self, config: LRegConfig) -> str | None:
        """The adapter that a composed grade of this configuration reads here; None if there is none, or if additive."""
        if config.grade_form != "composed":
            return None
        return next((name for name in reversed(config.previous_grades) if name in self.lreg_encoder), None)

    @property
    def stacked_adapters(self) -> list[str]:
        """The adapters whose shortcuts forward adds, in order: the active ones after the grades they stand on."""
        active: Any = self._active_adapter
        if self.previous_grades or isinstance(active, str):
            active = self.active_stack
        here: Any = self._modules["lreg_encoder"]
        return [name for name in active if name in here._modules]

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
        self.needs_data_init.discard(adapter_name)

    # Forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base module's output with the active shortcuts added to its first tensor."""
        if self.is_output_layer and (stand_in := self._note_call(args, kwargs)) is not None:
            return stand_in
        output = self._modules["base_layer"](*args, **kwargs)  # type: ignore[misc]
        if self._disable_adapters:
            return output
        names = None if torch.compiler.is_compiling() else this_thread.adapter_names
        adapters = self.stacked_adapters
        if not adapters and names is None:
            return output
        hidden, rebuild = first_tensor(output)
        features = self._features(args, kwargs)
        if names is not None:
            return rebuild(self._add_per_sample(features, hidden, names))
        for name in adapters:
            hidden = self._add(name, features, hidden)
        return rebuild(hidden)

    def _note_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """Tell the hooks of the model that its output layer runs; what stands in for logits that nobody wants."""
        if is_compiling():
            self.ran_compiled = True
            return None
        this_thread.output_layer_ran = True
        fused = this_thread.fused_pass
        return None if fused is None else fused.take(self, args, kwargs)  # type: ignore[no-any-return]

    def _add(self, name: str, features: Tensor, hidden: Tensor) -> Tensor:
        """`hidden` plus one shortcut."""
        layout = self.layout(name, features, hidden)
        if layout is ROW_BY_ROW:
            return self._sum(name, self.design(name, features), hidden)
        design = self.design(name, layout.rows(features))
        if layout.pools:  # averaging is linear: the design is averaged, which is as a rule narrower than the output
            design = layout.pool(design)
        if (
            layout.output_channels_first
        ):  # the sum has the strides of `hidden`, on which the order of later sums depends
            return hidden + layout.restore(self._sum(name, design, None)).to(hidden.dtype)
        return self._sum(name, design, hidden)

    def _sum(self, name: str, design: Tensor, hidden: Tensor | None) -> Tensor:
        """What a design `[..., K]` gives, and `hidden` `[..., out_features]` added to it."""
        dropout = self.lreg_dropout[name]
        if dropout and self.training and name in self.active_adapters:  # a grade below does not train
            design = F.dropout(design, dropout)
        parts: Any = self._modules
        return parts["lreg_coefficients"]._modules[name](design, hidden=hidden, scale=self.scaling[name])  # type: ignore[no-any-return]

    def design(self, adapter_name: str, features: Tensor) -> Tensor:
        """What the rows of `table` are weighted by: `[..., in_features]` -> `[..., K]`, fp32 or fp64."""
        parts: Any = self._modules
        if self.composed_on:
            features = self.encoder_input(adapter_name, features)
        latent = parts["lreg_projection"]._modules[adapter_name](features)
        return parts["lreg_encoder"]._modules[adapter_name](latent)  # type: ignore[no-any-return]

    def scaled_design(self, adapter_name: str, features: Tensor) -> Tensor:
        """The design times the scale of the adapter: what the shortcut adds is this times `table`."""
        return self.design(adapter_name, features) * self.scaling[adapter_name]

    def latent(self, adapter_name: str, features: Tensor) -> Tensor:
        """z = P x + b: `[..., in_features]` -> `[..., d]`, fp32 or fp64."""
        return self.lreg_projection[adapter_name](self.encoder_input(adapter_name, features))  # type: ignore[no-any-return]

    def coords(self, adapter_name: str, features: Tensor) -> Tensor:
        """u = sigmoid(z): `[..., in_features]` -> `[..., d]`."""
        return self.latent(adapter_name, features).sigmoid()

    def encoder_input(self, adapter_name: str, features: Tensor) -> Tensor:
        """What P multiplies: the features x `[..., in_features]`, and the basis below for a composed grade."""
        below = self.composed_on.get(adapter_name)
        if below is None:
            return features
        basis = self.lreg_encoder[below].basis(self.latent(below, features))  # type: ignore[operator,union-attr]
        return torch.cat((features.to(basis.dtype), basis), dim=-1)

    def table(self, adapter_name: str) -> Tensor:
        """The weights that the shortcut is linear in, `[K, out_features]`: its value is `design @ table`."""
        return self.lreg_coefficients[adapter_name].weight.T  # type: ignore[union-attr,return-value,operator]

    def shortcut(self, adapter_name: str, features: Tensor, like: Tensor) -> Tensor:
        """The shortcut's value alone.

        Args:
            adapter_name: which adapter.
            features: input of the module, `[..., in_features]` or channels first.
            like: output of the base module; gives dtype and layout.

        Returns:
            A tensor of the shape and dtype of `like`.
        """
        return self._add(adapter_name, features, torch.zeros_like(like))

    def fused_loss(self, features: Tensor, targets: Tensor, normaliser: Tensor | float | None = None) -> Tensor:
        """Cross-entropy of this module's output, with the active shortcuts, in chunks of rows.

        Args:
            features: `[n, in_features]`.
            targets: int64 `[n]`.
            normaliser: what the summed loss is divided by; None takes n.

        Returns:
            A scalar; see `core.fused_loss`.
        """
        kind = features.device.type
        dtype, enabled = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)

        def autocast_base(rows: Tensor) -> Tensor:
            with torch.autocast(kind, dtype, enabled):
                return first_tensor(self.base_layer(rows))[0]

        base = autocast_base if enabled or type(self.base_layer) is not nn.Linear else self.base_layer
        with torch.autocast(kind, enabled=False):
            names = self.stacked_adapters
            design = torch.cat([self.scaled_design(name, features) for name in names], dim=-1)
            table = torch.cat([self.table(name) for name in names])
            return fused_cross_entropy(base, features, targets, design, table, normaliser=normaliser)

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
                if adapter in self.lreg_encoder:  # not "__base__", nor an adapter that does not cover this module
                    result[rows] = self._add(adapter, features[rows], result[rows])
        return result

    # What it reads

    def _features(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """What the shortcuts read in the forward pass that is running."""
        if self.source is not None:
            return self.source.read()
        if args and isinstance(args[0], Tensor) and args[0].is_floating_point():
            return args[0]
        return first_input(args, kwargs, self._input_name, self.get_base_layer)

    def seen_features(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """What the shortcuts have read, for forward hooks of this module."""
        if self.source is not None:
            return self.source.last_read()
        return first_input(args, kwargs, self._input_name, self.get_base_layer)

    def layout(self, adapter_name: str | None, features: Tensor, output: Tensor) -> Layout:
        """How input and output of the module are laid out, for an adapter (None: as the shapes say).

        Raises:
            ValueError: if no shortcut fits between them.
        """
        reading = self.readings.get(adapter_name or "", UNSAID)
        if reading is UNSAID and self._is_row_by_row and self.source is None:
            return ROW_BY_ROW
        try:
            return Layout.of(self._hints, features.shape, output.shape, reading)
        except ValueError as error:
            kind = type(self.get_base_layer()).__name__
            raise ValueError(
                misfit(kind, (self.in_features, self.out_features), features.shape, output.shape, error)
            ) from None

    def register_input_hook(
        self, hook: Callable[[Tensor], None], adapter_name: str | None = None
    ) -> Callable[[], None]:
        """Call `hook` with the features `[..., in_features]` of every forward pass, as an adapter reads them (None: as
        the shapes say); returns what removes it."""

        def call(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            features = self.seen_features(args, kwargs)
            hook(self.layout(adapter_name, features, first_tensor(output)[0]).rows(features))

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
                layout = self.layout(adapter_name, features, hidden)
                with torch.no_grad():
                    rows = layout.pool(self.encoder_input(adapter_name, layout.rows(features)))
                hidden.register_hook(lambda gradient: hook(rows, layout.output_rows(gradient)))

        return self.register_forward_hook(call, with_kwargs=True).remove

    # Weights of one adapter

    def parts(self, adapter_name: str) -> tuple[Projection, LagrangeEncoder, Coefficients]:
        """A, the curve and B of an adapter."""
        return tuple(getattr(self, name)[adapter_name] for name in self.adapter_layer_names)  # type: ignore[return-value]

    def state_of(self, adapter_name: str) -> dict[str, Tensor]:
        """Weights and nodes of an adapter, by their names in this layer without the name of the adapter."""
        parts = zip(self.adapter_layer_names, self.parts(adapter_name), strict=True)
        return {f"{name}.{key}": tensor for name, part in parts for key, tensor in part.state_dict().items()}

    def is_identity(self, adapter_name: str) -> bool:
        """Whether this adapter adds nothing yet."""
        return not self.lreg_coefficients[adapter_name].weight.any()  # type: ignore[union-attr,operator]

    @torch.no_grad()
    def set_encoder(self, adapter_name: str, projection: Tensor, bias: Tensor, nodes: Tensor) -> None:
        """Give an adapter that is still the identity another projection and mesh, in place.

        Args:
            adapter_name: which adapter.
            projection: P, `[components, in_features]`, wider for a composed grade.
            bias: b, `[components]`.
            nodes: `[components, n_nodes]`.
        """
        own, encoder, _ = self.parts(adapter_name)
        encoder.set_nodes(nodes)
        own.weight.copy_(projection / own.scale)
        own.bias.copy_(bias)
        self.needs_data_init.discard(adapter_name)

    @torch.no_grad()
    def set_table(self, adapter_name: str, table: Tensor) -> None:
        """Write `[K, out_features]` into the weight of B, in place."""
        self.lreg_coefficients[adapter_name].weight.copy_(table.T)  # type: ignore[union-attr,operator]

    def nodal_coefficients(self, adapter_name: str) -> Tensor:
        """c of the paper, for every weighting: the values at the nodes, `[components, n_nodes, out_features]`."""
        _, encoder, coefficients = self.parts(adapter_name)
        return encoder.nodal_coefficients(coefficients.weight)

    def nodal_parameter(self, adapter_name: str) -> nn.Parameter:
        """The parameter that lives on the mesh: the profiles of a factored weighting, else the weight of B."""
        _, encoder, coefficients = self.parts(adapter_name)
        parameter: Any = coefficients.weight if encoder.weight is None else encoder.weight
        return parameter  # type: ignore[no-any-return]

    # Scales, as LoRA's layers have them: the shortcut is linear in its coefficients

    def set_scale(self, adapter: str, scale: float) -> None:
        """Multiply the shortcut of an adapter by `scale` from now on."""
        if adapter in self.scaling:
            self.scaling[adapter] = float(scale)

    def scale_layer(self, scale: float) -> None:
        """Multiply the active shortcuts by `scale`, on top of what they have."""
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Undo `scale_layer(scale)`; None puts the active shortcuts back to their own size."""
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] = 1.0 if scale is None else self.scaling[name] / scale

    # Between PEFT and the base module

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None, like: Tensor | None = None
    ) -> None:
        # Not PEFT's version, which reads device and dtype off `weight`: a whole block has none. `like` stands in for a
        # base without parameters.
        base = self.get_base_layer()
        source = next((p for p in base.parameters() if p.device.type != "meta"), like)
        device = device or (None if source is None else source.device)
        dtype = getattr(base, "compute_dtype", None)  # of a quantised layer
        if dtype is None and source is not None and source.is_floating_point() and source.dtype.itemsize > 1:
            dtype = source.dtype
        for part in self.parts(adapter_name):
            if not any(parameter.is_meta for parameter in part.parameters()):
                part.to(device=device, dtype=dtype)

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
        if name in ("weight", "bias") and "base_layer" in self.__dict__.get("_modules", {}):
            setattr(self.base_layer, name, value)
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


def layers_with_adapter(model: nn.Module, adapter_name: str) -> dict[str, LRegLayer]:
    """The layers of a model that carry an adapter, by name.

    Raises:
        ValueError: if there are none.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LRegLayer) and adapter_name in module.lreg_encoder
    }
    if not layers:
        there = {name for layer in model.modules() if isinstance(layer, LRegLayer) for name in layer.lreg_encoder}
        others = sorted({str(config.peft_type.value) for config in getattr(model, "peft_config", {}).values()})
        instead = f"Its adapters are of {', '.join(others)}. " if others and not there else ""
        raise ValueError(
            f"the model has no LReg adapter called {adapter_name!r}. {instead}"
            + (f"There are: {sorted(there)}." if there else "Call get_peft_model(model, LRegConfig(...)) first.")
        )
    return layers
