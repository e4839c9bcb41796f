"""From config to model."""

import timm
from torch import Tensor, nn

from dropkey.config.geometry import family
from dropkey.config.schema import ModelConfig
from dropkey.errors import ConfigError
from dropkey.models.mix_token import MixTokenVOLO


def create_model(
    model: ModelConfig,
    *,
    image_size: int,
    channels: int,
    num_classes: int,
    pretrained: bool = False,
    fused: bool = True,
) -> nn.Module:
    """The timm architecture of that name at this image size.

    Args:
        pretrained: start from timm's published weights.
        fused: whether plain attention is one call of `scaled_dot_product_attention`, or its parts. The parts are
            2.6 times as fast forward and backward under bf16 on a CPU (ViT 6 x 128, 65 tokens), as fast in fp32.
    Raises:
        ConfigError: the constructor refuses an argument, or published weights cannot be loaded.
    """
    arguments = {"drop_path_rate": model.drop_path, **constructor_arguments(model, image_size)}
    before = timm.layers.use_fused_attn()
    timm.layers.set_fused_attn(fused)  # read by each attention module when it is built
    try:
        made = timm.create_model(
            model.name, pretrained=pretrained, num_classes=num_classes, in_chans=channels, **arguments
        )
    except Exception as error:  # whatever code of timm's meets an argument that it cannot take
        text = " ".join(str(error).split())
        reason = f"{type(error).__name__} {text}" if isinstance(error, LookupError) else text or type(error).__name__
        hint = "; weights could not be fetched, is there a network?" if pretrained else ""
        given = {key: value for key, value in arguments.items() if not isinstance(value, Tensor)}  # a body's template
        raise ConfigError(f"model.name={model.name} with {given}: {reason[:300]}{hint}") from None
    finally:
        timm.layers.set_fused_attn(before)
    if getattr(made, "mix_token", False):
        made.__class__ = MixTokenVOLO  # the same weights, with another forward in training
    return made


def constructor_arguments(model: ModelConfig, image_size: int) -> dict:
    """What makes this architecture of timm's; stochastic depth, which matters in training alone, is not among it."""
    sizes = {key: getattr(model, key) for key in ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")}
    arguments = {key: value for key, value in sizes.items() if value is not None}
    if family(model.name) != "other" or has_fixed_input_size(model.name):
        arguments["img_size"] = image_size
    return {**arguments, **model.args}


def has_fixed_input_size(name: str) -> bool:
    config = timm.get_pretrained_cfg(name, allow_unregistered=True)
    return bool(config is not None and config.fixed_input_size)
