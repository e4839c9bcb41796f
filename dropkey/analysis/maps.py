"""Where a model looks: attention over the image, of a layer's heads or by rollout (paper, figures 1, 5 and 13).

Shapes: B images, H heads, Q queries, K keys, N tokens, M maps of h x w patches.
"""

from dataclasses import dataclass
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dropkey.analysis.attention import Attention, attention
from dropkey.errors import ConfigError
from dropkey.patching.find import key_grid
from dropkey.patching.patch import model_grid


@dataclass
class Maps:
    """Attention over the image."""

    values: Tensor  # B M h w, each map of sum 1
    names: list[str]  # of the M maps
    caption: str  # which layers, and whose attention


def look(model: nn.Module, images: Tensor, head: str = "rollout", layer: int = -1) -> Maps:
    """Maps of what a model attends to in images (B C H W).

    Whose attention: the class token's where the classifier reads that token, else the mean over queries. Class and
    other prefix tokens have no place on the map and are left out.

    Args:
        head: rollout; or of one layer mean, all, or the number of a head from 0.
        layer: which attention layer, in the order in which they run, from 0; negative from the end. Rollout is over
            all layers that share their tokens with the last.
    Raises:
        ConfigError: no such layer or head; one that looks around in windows and has no map of the whole image.
    """
    seen = attention(model, images)
    if head == "rollout":
        chosen = same_tokens(seen, model)
        if not chosen:
            raise ConfigError(refusal(seen[-1], model) + "; there is no rollout")
        values, names = rolled(chosen, model), ["rollout"]
        last = chosen[-1]
        some = "all" if len(chosen) == len(seen) else f"the last {len(chosen)} of"
        told = f"rollout over {some} {len(seen)} attention layers" + " (those of equal tokens)" * (some != "all")
    else:
        if not -len(seen) <= layer < len(seen):
            raise ConfigError(f"layer={layer}: {type(model).__name__} has {len(seen)} attention layers, from 0")
        last = seen[layer]
        if last.parts > 1:
            raise ConfigError(refusal(last, model) + "; take another layer=")
        values, names = choose_heads(explained(last, model), head)
        told = f"attention layer {layer % len(seen) + 1} of {len(seen)}, {last.name or type(model).__name__}"
    alone = "the pool's query" if last.weights.shape[-2] == 1 else "mean over queries"
    whose = "class token" if has_class_token(last, model) else alone
    return Maps(on_grid(values, last, model), names, f"{told}; {whose}")


def choose_heads(values: Tensor, head: str) -> tuple[Tensor, list[str]]:
    """B H K as B M K, with names."""
    heads = values.shape[1]
    if head == "mean":
        return values.mean(1, keepdim=True), ["mean over heads"]
    numbers = list(range(heads)) if head == "all" else [int(head)]
    if numbers[-1] >= heads:
        raise ConfigError(f"head={head}: the layer has {heads} heads, 0 to {heads - 1}")
    return values[:, numbers], [f"head {number}" for number in numbers]


def refusal(layer: Attention, model: nn.Module) -> str:
    name = f"{type(model).__name__}: {layer.name}"
    if layer.parts > 1:
        return f"{name} looks around in {layer.parts} windows of {layer.weights.shape[-1]} tokens, not over the image"
    queries, keys = layer.weights.shape[-2:]
    return f"{name} is {layer.kind} attention of {queries} queries to {keys} keys, which are not the same tokens"


# ------------------------------------------------------------------------------------------------- grid and tokens


def place(layer: Attention, model: nn.Module) -> tuple[tuple[int, int], int]:
    """Height and width of the keys on the image, and the number of prefix tokens before them."""
    grid, prefix = model_grid(model)
    try:
        return key_grid(layer.weights.shape[-1], grid, prefix)
    except ValueError:
        keys = layer.weights.shape[-1]
        raise ConfigError(f"{layer.name}: {keys} keys form no known grid of the image, so there is no map") from None


def has_class_token(layer: Attention, model: nn.Module) -> bool:
    """Whether the first key is a class token that the classifier reads."""
    return place(layer, model)[1] > 0 and getattr(model, "global_pool", "token") in ("token", "")


def explained(layer: Attention, model: nn.Module) -> Tensor:
    """B H K: a layer's attention that matters to the classifier."""
    if layer.weights.shape[-2] == 1 or has_class_token(layer, model):
        return layer.weights[:, :, 0]
    return layer.weights.mean(-2)


def on_grid(values: Tensor, layer: Attention, model: nn.Module) -> Tensor:
    """B M K as maps B M h w of sum 1."""
    grid, prefix = place(layer, model)
    patches = values[..., prefix:].float()
    return (patches / patches.sum(-1, keepdim=True)).unflatten(-1, grid)


# --------------------------------------------------------------------------------------------------------- rollout


def rollout(layers: list[Tensor], start: Optional[Tensor] = None) -> Tensor:
    """Attention rollout (Abnar and Zuidema, 2020, arXiv 2005.00928): heads averaged, the identity added for the
    residual connection, rows normalised, multiplied over layers.

    Args:
        layers: B H N N each, first layer first. One whose only query is the class token (B H 1 N) moves that token
            alone; one over N - 1 tokens came before the class token was put in front of them.
        start: B 1 N, the token or mixture of tokens to be explained; None: every token.
    Returns:
        B N N or B 1 N, rows of sum 1: how much of each input token went into what is explained.
    """
    images, tokens = len(layers[-1]), layers[-1].shape[-1]
    rows = torch.eye(tokens, device=layers[-1].device).expand(images, -1, -1) if start is None else start
    for weights in reversed(layers):  # from the end, so that a single row stays one
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


def same_tokens(seen: list[Attention], model: nn.Module) -> list[Attention]:
    """The last layers that share their tokens, but for a class token put in front of them between two: all of a ViT,
    VOLO after its outlook attention, the last stage of a hierarchical model."""
    taken: list[Attention] = []
    for layer in reversed(seen):
        queries, keys = layer.weights.shape[-2:]
        if layer.kind not in ("self", "class") or layer.parts > 1 or queries not in (1, keys):
            break
        if taken:
            tokens, before = taken[0].weights.shape[-1], taken[0].kind
            if keys != tokens and not (before == "class" and keys == tokens - 1):
                break
        taken.insert(0, layer)
    return taken


def rolled(chosen: list[Attention], model: nn.Module) -> Tensor:
    """B 1 N: the rollout of what the classifier reads."""
    last = chosen[-1]
    layers = [layer.weights for layer in chosen]
    values = explained(last, model)
    if has_class_token(last, model):
        start = torch.zeros_like(values[:, :1])
        start[..., 0] = 1.0
    elif last.weights.shape[-2] == 1:  # a pool reads the tokens and is none of them
        start, layers = values.mean(1, keepdim=True), layers[:-1]
    else:
        start = torch.full_like(values[:, :1], 1 / values.shape[-1])
    return rollout(layers, start) if layers else start
