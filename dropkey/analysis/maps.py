"""What a model attends to: maps over the image, of a layer's heads or by rollout (paper, figures 1, 5 and 13).

Shapes: B images, H heads, Q queries, K keys, N tokens, M maps of h x w patches.
"""

from dataclasses import dataclass
from typing import Optional

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from dropkey.analysis.capture import LayerAttention, attention_weights
from dropkey.errors import ConfigError
from dropkey.patching.find import key_grid
from dropkey.patching.patch import model_grid


@dataclass
class AttentionMaps:
    """LayerAttention over the image."""

    values: Tensor  # B M h w, each map of sum 1
    names: list[str]  # one per map
    caption: str  # which layers and queries
    layer: Optional[int]  # in forward order from 0; None: rollout


def attention_maps(model: nn.Module, images: Tensor, head: str = "rollout", layer: int = -1) -> AttentionMaps:
    """Maps of what a model attends to in images (B C H W).

    They show the class token's attention where the classifier reads that token, else the mean over queries. Class and
    other prefix tokens have no place on the map and are left out.

    Args:
        head: rollout; or of one layer mean, all, or the number of a head from 0.
        layer: which attention layer, in forward order from 0; negative from the end. Rollout is over all layers that
            have the same tokens as the last.
    Raises:
        ConfigError: no such layer or head; one that attends in windows and has no map of the whole image.
    """
    layers = attention_weights(model, images)
    if head == "rollout":
        chosen = last_with_same_tokens(layers)
        if not chosen:
            raise ConfigError(no_map(layers[-1], model) + "; there is no rollout")
        values, names, last = model_rollout(chosen, model), ["rollout"], chosen[-1]
        part = "all" if len(chosen) == len(layers) else f"the last {len(chosen)} of"
        caption = f"rollout over {part} {len(layers)} attention layers"
        caption += "" if part == "all" else " (those with the same tokens)"
        number = None
    else:
        if not -len(layers) <= layer < len(layers):
            raise ConfigError(f"layer={layer}: {type(model).__name__} has {len(layers)} attention layers, from 0")
        number = layer % len(layers)
        last = layers[number]
        if last.windows > 1:
            raise ConfigError(no_map(last, model) + "; choose another layer=")
        values, names = select_heads(relevant_attention(last, model), head)
        caption = f"attention layer {number + 1} of {len(layers)}, {last.name or type(model).__name__}"
    query = "the pool's query" if last.weights.shape[-2] == 1 else "mean over queries"
    query = "class token" if has_class_token(last, model) else query
    return AttentionMaps(on_grid(values, last, model), names, f"{caption}; {query}", number)


def head_maps(model: nn.Module, images: Tensor) -> dict[int, Tensor]:
    """Number of the layer -> maps of its heads (B H h w), for each layer that attends over the whole image."""
    return {
        number: on_grid(relevant_attention(layer, model), layer, model)
        for number, layer in enumerate(attention_weights(model, images))
        if layer.windows == 1
    }


def select_heads(values: Tensor, head: str) -> tuple[Tensor, list[str]]:
    """B H K to B M K, and the names of the maps."""
    heads = values.shape[1]
    if head == "mean":
        return values.mean(1, keepdim=True), ["mean over heads"]
    numbers = list(range(heads)) if head == "all" else [int(head)]
    if numbers[-1] >= heads:
        raise ConfigError(f"head={head}: the layer has {heads} heads, 0 to {heads - 1}")
    return values[:, numbers], [f"head {number}" for number in numbers]


def no_map(layer: LayerAttention, model: nn.Module) -> str:
    """Why a layer has no map of the image."""
    name, (queries, keys) = f"{type(model).__name__}: {layer.name}", layer.weights.shape[-2:]
    if layer.windows > 1:
        return f"{name} attends in {layer.windows} windows of {keys} tokens, not over the image"
    return f"{name} is {layer.kind} attention of {queries} queries to {keys} keys, which are not the same tokens"


# ------------------------------------------------------------------------------------------------- grid and tokens


def grid_of(layer: LayerAttention, model: nn.Module) -> tuple[tuple[int, int], int]:
    """Height and width of the keys on the image, and the number of prefix tokens before them."""
    grid, prefix = model_grid(model)
    try:
        return key_grid(layer.weights.shape[-1], grid, prefix)
    except ValueError:
        keys = layer.weights.shape[-1]
        raise ConfigError(f"{layer.name}: {keys} keys fit no known grid of the image, so there is no map") from None


def has_class_token(layer: LayerAttention, model: nn.Module) -> bool:
    """Whether the first key is a class token that the classifier reads."""
    return grid_of(layer, model)[1] > 0 and getattr(model, "global_pool", "token") in ("token", "")


def relevant_attention(layer: LayerAttention, model: nn.Module) -> Tensor:
    """B H K: the class token's (or single query's) attention, else the mean over queries."""
    if layer.weights.shape[-2] == 1 or has_class_token(layer, model):
        return layer.weights[:, :, 0]
    return layer.weights.mean(-2)


def on_grid(values: Tensor, layer: LayerAttention, model: nn.Module) -> Tensor:
    """B M K to maps B M h w of sum 1."""
    grid, prefix = grid_of(layer, model)
    patches = values[..., prefix:].float()
    return rearrange(patches / patches.sum(-1, keepdim=True), "b m (h w) -> b m h w", h=grid[0])


# --------------------------------------------------------------------------------------------------------- rollout


def rollout(layers: list[Tensor], start: Optional[Tensor] = None) -> Tensor:
    """Attention rollout (Abnar and Zuidema, 2020, arXiv 2005.00928): heads averaged, the identity added for the
    residual connection, rows normalised, multiplied over layers.

    Args:
        layers: B H N N each, first layer first. One whose only query is the class token (B H 1 N) changes that token
            alone; one over N - 1 tokens runs before the class token is prepended.
        start: B 1 N, the token or mixture of tokens to explain; None: every token.
    Returns:
        B N N or B 1 N, rows of sum 1: the share of each input token in what is explained.
    """
    images, tokens = len(layers[-1]), layers[-1].shape[-1]
    rows = torch.eye(tokens, device=layers[-1].device).expand(images, -1, -1) if start is None else start
    for weights in reversed(layers):  # from the end, so that a single row stays a single row
        rows = rows @ transition(weights.float().mean(1), tokens)
    return rows


def transition(weights: Tensor, tokens: int) -> Tensor:
    """One layer of `rollout`, heads averaged: B N N, rows of sum 1."""
    own = torch.eye(tokens, device=weights.device).expand(len(weights), -1, -1)
    if weights.shape[-1] == tokens - 1:
        weights = F.pad(weights, (1, 0, 1, 0))
        weights[:, 0, 0] = 1.0
    elif weights.shape[-2] == 1:
        weights = torch.cat([weights, own[:, 1:]], dim=1)
    mixed = weights + own
    return mixed / mixed.sum(-1, keepdim=True)


def last_with_same_tokens(layers: list[LayerAttention]) -> list[LayerAttention]:
    """The last layers with the same tokens, except for a class token prepended between two: all layers of a ViT, those
    of VOLO after its outlook attention, the last stage of a hierarchical model."""
    taken: list[LayerAttention] = []
    for layer in reversed(layers):
        queries, keys = layer.weights.shape[-2:]
        if layer.kind not in ("self", "class") or layer.windows > 1 or queries not in (1, keys):
            break
        if taken:
            tokens, before = taken[0].weights.shape[-1], taken[0].kind
            if keys != tokens and not (before == "class" and keys == tokens - 1):
                break
        taken.insert(0, layer)
    return taken


def model_rollout(chosen: list[LayerAttention], model: nn.Module) -> Tensor:
    """B 1 N: the rollout of what the classifier reads."""
    last = chosen[-1]
    layers = [layer.weights for layer in chosen]
    values = relevant_attention(last, model)
    if has_class_token(last, model):
        start = torch.zeros_like(values[:, :1])
        start[..., 0] = 1.0
    elif last.weights.shape[-2] == 1:  # the query of a pool is not one of the tokens
        start, layers = values.mean(1, keepdim=True), layers[:-1]
    else:
        start = torch.full_like(values[:, :1], 1 / values.shape[-1])
    return rollout(layers, start) if layers else start
