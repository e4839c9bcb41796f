"""DropKey on a CPU at the cost of plain attention, in eager PyTorch.

What the paper's two lines spend is memory traffic: a mask, its random numbers, masked logits, weights, each B H Q K.
Here one buffer goes through all of it. The coin flips are written into it as the bit pattern of 0 or -inf, the
product of queries and keys is added on top (which a matrix product does for free), softmax runs in place, and what
remains is kept for the backward, which needs neither mask nor random numbers: a dropped key has weight 0 there.
A few heads at a time, so that the buffer stays in cache.
Shapes: B batch, H heads, Q queries, K keys, D head width.
"""

from typing import Iterator, Optional

import torch
from torch import Tensor

from dropkey import flips
from dropkey.operator.sdpa import MINUS_INF, additive

CACHE = 5 << 18  # bytes of logits per thread
FLIPS = 1 << 17  # coin flips at once per thread
EMPTY_CHANCE = 1e-12  # that some query loses all its keys: below, not worth a pass over the logits


def pieces(q: Tensor, k: Tensor) -> Iterator[tuple[slice, slice]]:
    """Parts of (B, H) whose logits fit the cache: some samples with all heads, or some heads of one sample."""
    batch, heads = q.shape[:2]
    room = max(1, CACHE * max(2, torch.get_num_threads()) // max(1, 4 * q.shape[2] * k.shape[2]))
    if room >= heads:
        step = room // heads
        for b in range(0, batch, step):
            yield slice(b, min(b + step, batch)), slice(0, heads)
        return
    for b in range(batch):
        for h in range(0, heads, room):
            yield slice(b, b + 1), slice(h, min(h + room, heads))


def flat(x: Tensor, piece: tuple[slice, slice]) -> Tensor:
    """The matrices of a piece in a row: (samples · heads) × rows × columns."""
    return x[piece].flatten(0, 1)


def part(x: Tensor, piece: tuple[slice, slice]) -> Tensor:
    """The piece of a tensor that may be broadcast over samples or heads."""
    samples, heads = (at if size > 1 else slice(None) for at, size in zip(piece, x.shape[:2], strict=True))
    return x[samples, heads]


class Masks:
    """Writes 0 and -inf: the bits of coin flips, or of a given mask, plus a bias."""

    def __init__(
        self, weights: Tensor, bias: Optional[Tensor], drop: Optional[Tensor], seed: Tensor, threshold: Tensor
    ) -> None:
        batch, heads, queries, keys = weights.shape
        self.bias, self.drop, self.queries = bias, drop, queries
        self.integer, self.minus_inf = MINUS_INF[weights.dtype]
        if drop is None:
            self.rows = flips.row_keys(seed, batch * heads * queries)
            self.columns, self.limit = flips.column_keys(keys, seed.device), flips.as_limit(threshold)
            self.scratch = torch.empty(2, max(1, FLIPS * torch.get_num_threads() // max(1, keys)), keys, dtype=torch.int32)
        chance = float(flips.as_ratio(threshold)) ** keys * batch * heads * queries
        self.may_be_empty = bias is not None or drop is not None or chance > EMPTY_CHANCE

    def write(self, logits: Tensor, piece: tuple[slice, slice], pair: int) -> None:
        """logits: the piece, contiguous, whose first matrix is number `pair` of B H."""
        if self.drop is not None:
            logits.copy_(additive(part(self.drop, piece), logits.dtype))
        else:
            self.flip(logits.view(self.integer).flatten(0, -2), pair * self.queries)
        if self.bias is not None:
            logits.add_(part(self.bias, piece))

    def flip(self, bits: Tensor, first: int) -> None:
        """Rows first, first + 1, ... of the mask. Few at a time: their operands then stay in the nearest caches."""
        step = self.scratch.shape[1]
        for start in range(0, len(bits), step):
            some = bits[start : start + step]
            hits, spare = self.scratch[:, : len(some)]
            if some.dtype == hits.dtype:
                hits = some
            rows = self.rows[:, first + start : first + start + len(some)]
            flips.fill(hits, rows, self.columns, self.limit, spare)
            if some.dtype != hits.dtype:
                some.copy_(hits)
            some.mul_(self.minus_inf)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Optional[Tensor],
    drop: Optional[Tensor],
    seed: Tensor,
    threshold: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(output, weights): B H Q D in the memory order B Q H D, which is what a projection of joined heads reads, and
    B H Q K. `bias` and `drop` have four dimensions and broadcast; without `drop`, keys flip by seed and threshold."""
    batch, heads, queries, _ = q.shape
    weights = q.new_empty(batch, heads, queries, k.shape[2])
    out = q.new_empty(batch, queries, heads, v.shape[3]).transpose(1, 2)
    masks = Masks(weights, bias, drop, seed, threshold)
    pair = 0
    for piece in pieces(q, k):
        masks.write(weights[piece], piece, pair)
        logits = flat(weights, piece)
        pair += len(logits)
        logits.baddbmm_(flat(q, piece), flat(k, piece).transpose(1, 2), alpha=scale)
        softmax_(logits, masks.may_be_empty)
        out[piece] = torch.bmm(logits, flat(v, piece)).view(out[piece].shape)
    return out, weights


def softmax_(logits: Tensor, may_be_empty: bool) -> None:
    """In place; a row that is -inf throughout becomes 0."""
    if may_be_empty:
        empty = logits.amax(-1, keepdim=True) == -torch.inf
        if empty.any():
            torch.softmax(logits.masked_fill_(empty, 0.0), -1, out=logits)
            logits.masked_fill_(empty, 0.0)
            return
    torch.softmax(logits, -1, out=logits)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, weights: Tensor, bias: Optional[Tensor], scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, and of `bias` (without elements if there is none), contiguous."""
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
    full = torch.promote_types(q.dtype, torch.float32)  # many small terms add up in the bias
    dbias = torch.zeros((0,) if bias is None else bias.shape, dtype=full)
    for piece in pieces(q, k):
        p, g = flat(weights, piece), flat(grad, piece)
        torch.bmm(p.transpose(1, 2), g, out=flat(dv, piece))
        d = torch.bmm(g, flat(v, piece).transpose(1, 2))
        torch.ops.aten._softmax_backward_data.out(d, p, -1, p.dtype, grad_input=d)
        if bias is not None:
            into = part(dbias, piece)
            into += d.view(weights[piece].shape).to(full).sum_to_size(into.shape)
        for result, left, right in ((dq, d, k), (dk, d.transpose(1, 2), q)):
            into = flat(result, piece)
            torch.baddbmm(into, left, flat(right, piece), beta=0, alpha=scale, out=into)
    return dq, dk, dv, dbias


forward_op = torch.library.custom_op(
    "dropkey::cpu_forward",
    forward,
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? drop, Tensor seed, Tensor threshold, float scale)"
    " -> (Tensor, Tensor)",
)
backward_op = torch.library.custom_op(
    "dropkey::cpu_backward",
    backward,
    mutates_args=(),
    schema="(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor weights, Tensor? bias, float scale)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)


@forward_op.register_fake
def _(q, k, v, bias, drop, seed, threshold, scale):
    batch, heads, queries, _ = q.shape
    out = q.new_empty(batch, queries, heads, v.shape[3]).transpose(1, 2)
    return out, q.new_empty(batch, heads, queries, k.shape[2])


@backward_op.register_fake
def _(grad, q, k, v, weights, bias, scale):
    full = torch.promote_types(q.dtype, torch.float32)
    dbias = q.new_empty((0,) if bias is None else bias.shape, dtype=full)
    return *(x.new_empty(x.shape) for x in (q, k, v)), dbias


def save(ctx, inputs, output) -> None:
    q, k, v, bias, _, _, _, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, output[1], bias if bias is not None and bias.requires_grad else None)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def gradients(ctx, compute, grad: Optional[Tensor]):
    q, k, v, weights, bias = ctx.saved_tensors
    if grad is None:
        return (None,) * 8
    dq, dk, dv, dbias = compute(grad, q, k, v, weights, bias, ctx.scale)
    return dq, dk, dv, None if bias is None else dbias.to(bias.dtype), None, None, None, None


forward_op.register_autograd(lambda ctx, grad, _: gradients(ctx, backward_op, grad), setup_context=save)


class Eager(torch.autograd.Function):
    """The same without the 0.1 ms that a registered operator costs per call."""

    forward = staticmethod(forward)
    setup_context = staticmethod(save)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _):
        return gradients(ctx, backward, grad)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    seed: Tensor,
    threshold: Tensor,
    drop: Optional[Tensor],
    scale: float,
    bias: Optional[Tensor],
) -> Tensor:
    """Attention without the keys in `drop`, or without drop each key flipped by `seed` and `threshold`; a query that
    lost all its keys gives 0. Logits are rounded to the dtype of q, in bf16 to three digits."""
    if bias is not None:
        bias = additive(~bias, q.dtype) if bias.dtype == torch.bool else bias.to(q.dtype)
        bias = bias.view(*(1,) * (4 - bias.dim()), *bias.shape)
    attend = forward_op if torch.compiler.is_compiling() else Eager.apply
    return attend(q, k, v, bias, drop, seed, threshold, scale)[0]
