"""Where the meshes of a model are: one site per adapter of a layer."""

from dataclasses import dataclass

from torch import Tensor, nn

from .layer import LRegLayer


@dataclass(frozen=True)
class Site:
    """One adapter of one layer.

    Attributes:
        module: path of the layer in the model.
        layer: the layer.
        adapter: name of the adapter.
    """

    module: str
    layer: LRegLayer
    adapter: str

    @property
    def nodes(self) -> Tensor:
        """`[components, n_nodes]`."""
        return self.layer.parts(self.adapter)[1].nodes

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter that lives on the mesh."""
        return self.layer.nodal_parameter(self.adapter)


def all_sites(model: nn.Module, adapter_name: str | None = None) -> list[Site]:
    """The adapters of all LReg layers of a model.

    Args:
        model: any module that contains LReg layers.
        adapter_name: which adapter; None takes the active ones of every layer.

    Raises:
        ValueError: if there are none; the message says why.
    """
    sites = [
        Site(path, layer, name)
        for path, layer in model.named_modules()
        if isinstance(layer, LRegLayer)
        for name in (layer.active_adapters if adapter_name is None else [adapter_name])
        if name in layer.lreg_encoder
    ]
    if not sites:
        layers = [module for module in model.modules() if isinstance(module, LRegLayer)]
        if not layers:
            raise ValueError(
                f"the model ({type(model).__name__}) has no LReg layer. Adapt it first: "
                "get_peft_model(model, LRegConfig(...)), or model.add_adapter(LRegConfig(...))."
            )
        there = sorted({name for layer in layers for name in layer.lreg_encoder})
        wanted = "an active adapter" if adapter_name is None else f"an adapter named {adapter_name!r}"
        raise ValueError(f"no LReg layer has {wanted}. The adapters are: {there}.")
    return sites


def movable_sites(model: nn.Module, adapter_name: str | None = None) -> list[Site]:
    """The adapters whose meshes have nodes that can move.

    Args:
        model: any module that contains LReg layers.
        adapter_name: which adapter; None takes the active ones of every layer.

    Raises:
        ValueError: if there are none; the message says why.
    """
    movable = [site for site in all_sites(model, adapter_name) if site.nodes.shape[1] > 2]
    if not movable:
        raise ValueError(
            "every mesh has n_nodes=2, the two ends of (0, 1), so that no node can move. "
            "Set LRegConfig(n_nodes=...) to 3 or more."
        )
    return movable


def check_whole(site: Site) -> None:
    """Raise a `RuntimeError` if processes hold parts of what lives on a mesh (FSDP, ZeRO-3)."""
    parameter = site.parameter
    if hasattr(parameter, "full_tensor") or not isinstance(parameter, nn.Parameter) or parameter.ndim != 2:
        raise RuntimeError(
            f"the coefficients of {site.module} are sharded over processes, and meshes move on whole ones. "
            "Use data parallelism without sharding for the adapter, or keep the meshes as they are."
        )
