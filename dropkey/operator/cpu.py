"""DropKey on a CPU at about the cost of plain attention, in eager PyTorch.

The paper's two lines spend their time on memory traffic: a mask, its random numbers, masked logits and weights, each
B H Q K. Here one buffer serves all of them. The Bernoulli draws are written into it as the bit pattern of 0 or -inf,
the product of queries and keys is added on top (free in a matrix product), softmax runs in place, and the weights are
kept for the backward pass, which needs neither mask nor random numbers: a dropped key has weight 0 there. A few
matrices are computed at a time, so that the buffer stays in cache.
Shapes: B batch, H heads, Q queries, K keys, D head width.
"""

from typing import Iterator, Optional

import torch
from torch import Tensor

from dropkey import bernoulli
from dropkey.operator.sdpa import MINUS_INF, minus_inf_where

CACHE_BYTES = 1 << 21  # of logits per thread
DRAWS = 1 << 17  # at once per thread
JOIN_BYTES = 1 << 21  # of all logits, up to which all matrices are computed in one call
EMPTY_CHANCE = 1e-12  # that some query loses all its keys: below, a pass over the logits is not worth it


class MatrixOrder:
    """In which order the B H matrices are computed: "outer, inner" instead of "batch, heads".

    The samples of one head (or the heads of one sample) lie at equal distances in any of the usual layouts, so one call
    multiplies them without a copy; only where everything is small are all matrices joined, by a copy.
    """

    def __init__(self, q: Tensor, k: Tensor) -> None:
        self.batch, self.heads = q.shape[:2]
        self.matrix_bytes = 4 * q.shape[2] * k.shape[2]
        self.joined = self.batch * self.heads * self.matrix_bytes <= JOIN_BYTES
        self.swapped = not self.joined and self.batch >= self.heads

    def split(self, x: Tensor) -> Tensor:
        """B H ... (or 1 in their places) as outer inner ...; a view unless joined."""
        if self.joined:
            return x.expand(self.batch, self.heads, *x.shape[2:]).reshape(1, -1, *x.shape[2:])
        return x.transpose(0, 1) if self.swapped else x

    def merge(self, x: Tensor) -> Tensor:
        """The inverse of `split`, a view."""
        if self.joined:
            return x.unflatten(1, (self.batch, self.heads)).squeeze(0)
        return x.transpose(0, 1) if self.swapped else x

    def empty(self, like: Tensor, *matrix: int) -> Tensor:
        """Outer inner rows columns."""
        sizes = (1, self.batch * self.heads) if self.joined else (self.batch, self.heads)
        return like.new_empty(*(sizes[::-1] if self.swapped else sizes), *matrix)

    def pieces(self, x: Tensor) -> Iterator[tuple[int, slice]]:
        """Indices into outer inner ... of as many matrices as fit the cache."""
        threads = torch.get_num_threads()
        count = max(threads, CACHE_BYTES * max(2, threads) // max(1, self.matrix_bytes))
        for outer in range(x.shape[0]):
            for start in range(0, x.shape[1], count):
                yield outer, slice(start, min(start + count, x.shape[1]))


def take(x: Tensor, piece: tuple[int, slice]) -> Tensor:
    """That piece of outer inner ..., either of which may be 1 for all."""
    outer, inner = piece
    return x[outer if x.shape[0] > 1 else 0, inner if x.shape[1] > 1 else slice(None)]


class MaskWriter:
    """Writes 0 and -inf: the bits of Bernoulli draws or of a given mask, plus a bias."""

    def __init__(
        self,
        order: MatrixOrder,
        weights: Tensor,
        bias: Optional[Tensor],
        drop: Optional[Tensor],
        seed: Tensor,
        threshold: Tensor,
    ) -> None:
        *_, queries, keys = weights.shape
        rows = order.batch * order.heads * queries
        self.bias, self.drop = (None if x is None else order.split(x) for x in (bias, drop))
        self.integer, self.minus_inf = MINUS_INF[weights.dtype]
        self.next_row = 0
        if drop is None:
            numbers = torch.arange(rows).view(order.batch, order.heads, queries, 1)
            self.rows = bernoulli.row_keys(seed, order.split(numbers).reshape(-1))
            self.columns, self.limit = bernoulli.column_keys(keys, seed.device), bernoulli.signed_limit(threshold)
            self.step = max(1, DRAWS * torch.get_num_threads() // max(1, keys))
            self.scratch = torch.empty(2, min(self.step, rows), keys, dtype=torch.int32)
        chance = float(bernoulli.as_ratio(threshold)) ** keys * rows
        self.may_be_empty = bias is not None or drop is not None or chance > EMPTY_CHANCE

    def write(self, logits: Tensor, piece: tuple[int, slice]) -> None:
        """logits: the piece, contiguous; pieces come in order."""
        if self.drop is not None:
            logits.copy_(minus_inf_where(take(self.drop, piece), logits.dtype))
        else:
            self.draw(logits.view(self.integer).flatten(0, 1))
        if self.bias is not None:
            logits.add_(take(self.bias, piece))

    def draw(self, bits: Tensor) -> None:
        """A few rows at a time: their operands then stay in the nearest caches."""
        for start in range(0, len(bits), self.step):
            part = bits[start : start + self.step]
            draws, scratch = self.scratch[:, : len(part)]
            draws = part if part.dtype == draws.dtype else draws
            rows = self.rows[:, self.next_row : self.next_row + len(part)]
            bernoulli.draw_into(draws, rows, self.columns, self.limit, scratch)
            if draws is not part:
                part.copy_(draws)
            part.mul_(self.minus_inf)
            self.next_row += len(part)


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
    """The output (B H Q D) and the weights for `backward`. `bias` and `drop` have four dimensions and broadcast;
    without `drop`, the mask is drawn from seed and threshold."""
    order = MatrixOrder(q, k)
    weights, out = order.empty(q, q.shape[2], k.shape[2]), order.empty(q, q.shape[2], v.shape[3])
    masks = MaskWriter(order, weights, bias, drop, seed, threshold)
    q, k, v = map(order.split, (q, k, v))
    for piece in order.pieces(q):
        logits = weights[piece]
        masks.write(logits, piece)
        logits.baddbmm_(q[piece], k[piece].transpose(1, 2), alpha=scale)
        softmax_(logits, masks.may_be_empty)
        torch.bmm(logits, v[piece], out=out[piece])
    return order.merge(out), weights


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
    """Gradients of q, k, v, and of `bias` (without elements if there is none)."""
    order = MatrixOrder(q, k)
    dq, dk, dv = (order.empty(x, *x.shape[2:]) for x in (q, k, v))
    shape, full = None if bias is None else bias.shape, torch.promote_types(q.dtype, torch.float32)
    dbias = None if bias is None else torch.zeros(order.split(bias).shape, dtype=full)  # many small terms add up
    grad, q, k, v = map(order.split, (grad, q, k, v))
    for piece in order.pieces(q):
        p, g = weights[piece], grad[piece]
        torch.bmm(p.transpose(1, 2), g, out=dv[piece])
        d = torch.bmm(g, v[piece].transpose(1, 2))
        torch.ops.aten._softmax_backward_data.out(d, p, -1, p.dtype, grad_input=d)
        if dbias is not None:
            into = take(dbias, piece)
            into += d.to(full).sum_to_size(into.shape)
        for result, left, right in ((dq, d, k), (dk, d.transpose(1, 2), q)):
            torch.baddbmm(result[piece], left, right[piece], beta=0, alpha=scale, out=result[piece])
    dbias = torch.empty(0, dtype=full) if dbias is None else order.merge(dbias).sum_to_size(shape)
    return *map(order.merge, (dq, dk, dv)), dbias.contiguous()


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
    order = MatrixOrder(q, k)
    return order.merge(order.empty(q, q.shape[2], v.shape[3])), order.empty(q, q.shape[2], k.shape[2])


@backward_op.register_fake
def _(grad, q, k, v, weights, bias, scale):
    order, full = MatrixOrder(q, k), torch.promote_types(q.dtype, torch.float32)
    dbias = q.new_empty((0,) if bias is None else bias.shape, dtype=full)
    return *(order.merge(order.empty(x, *x.shape[2:])) for x in (q, k, v)), dbias


def setup_context(ctx, inputs, output) -> None:
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


forward_op.register_autograd(lambda ctx, grad, _: gradients(ctx, backward_op, grad), setup_context=setup_context)


class Eager(torch.autograd.Function):
    """The same as `forward_op` without the 0.1 ms that a registered operator costs per call."""

    forward = staticmethod(forward)
    setup_context = staticmethod(setup_context)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _):
        return gradients(ctx, backward, grad)


def cpu_attention(
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
    """Attention without the keys in `drop`, or without `drop` with a mask drawn from `seed` and `threshold`; a query
    that lost all its keys gives 0. Logits are rounded to the dtype of q, in bfloat16 to about three digits."""
    if bias is not None:
        bias = minus_inf_where(~bias, q.dtype) if bias.dtype == torch.bool else bias.to(q.dtype)
        bias = bias.view(*(1,) * (4 - bias.dim()), *bias.shape)
    compute = forward_op if torch.compiler.is_compiling() else Eager.apply
    return compute(q, k, v, bias, drop, seed, threshold, scale)[0]
