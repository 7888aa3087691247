"""Where shortcuts go in image models if nobody says so.

Li, Cheng & Gu (2025), Table 2: around the last stage of a ResNet, from an earlier block to the features of a
MobileNetV2, and from the class token to the logits of a vision transformer.
"""

from torch import nn

#: Modules to adapt, and from which others they read.
Placement = tuple[list[str], dict[str, str]]

# Folder of the stages by model type; the last one is adapted.
_STAGES = {
    "convnext": "encoder.stages",
    "convnextv2": "encoder.stages",
    "regnet": "encoder.stages",
    "resnet": "encoder.stages",
    "segformer": "stages",
    "swin": "encoder.layers",
}
# A classification layer on the class token; DeiT with a teacher has two.
_CLASS_TOKEN = ("beit", "data2vec-vision", "deit", "dinov2", "dinov2_with_registers", "vit")
_CLASSIFIERS = ("classifier", "cls_classifier", "distillation_classifier")


def image_placement(model: nn.Module, trains_head: bool) -> Placement | None:
    """The placement for an image model; None if there is none.

    Args:
        model: the base model.
        trains_head: whether its classification head is trained in full: it gets no shortcut then.
    """
    model_type = str(getattr(getattr(model, "config", None), "model_type", None))
    names = [name for name, _ in model.named_modules()]
    if model_type in _STAGES:
        folder = next((name for name in names if f".{name}".endswith(f".{_STAGES[model_type]}")), None)
        stages = list(model.get_submodule(folder).named_children()) if folder else []
        return ([f"{_STAGES[model_type]}.{stages[-1][0]}"], {}) if stages else None
    if model_type == "mobilenet_v2" and any(f".{name}".endswith(".layer.8") for name in names):
        # The paper counts the stem as two blocks: its block 10 is this one.
        return ["conv_1x1"], {"conv_1x1": "layer.8"}
    if model_type == "efficientnet" and any(f".{name}".endswith(".encoder.top_conv") for name in names):
        return ["encoder.top_conv"], {}  # the layer that makes the features of the last stage's output
    if model_type in _CLASS_TOKEN and not trains_head:
        heads = [name for name in _CLASSIFIERS if isinstance(getattr(model, name, None), nn.Module)]
        heads = [name for name in heads if not isinstance(model.get_submodule(name), nn.Identity)]
        return (heads, {}) if heads else None
    return None
