"""DropKey on a CPU at the cost of plain attention, in eager PyTorch.

What the paper's two lines spend is memory traffic: a mask, its random numbers, masked logits, weights, each B H Q K.
Here one buffer goes through all of it. The coin flips are written into it as the bit pattern of 0 or -inf, the
product of queries and keys is added on top (which a matrix product does for free), softmax runs in place, and what
remains is kept for the backward, which needs neither mask nor random numbers: a dropped key has weight 0 there.
A few matrices at a time, so that the buffer stays in cache.
Shapes: B batch, H heads, Q queries, K keys, D head width.
"""

from typing import Iterator, Optional

import torch
from torch import Tensor

from dropkey import bernoulli
from dropkey.operator.sdpa import MINUS_INF, additive

CACHE = 1 << 21  # bytes of logits per thread
FLIPS = 1 << 17  # coin flips at once per thread
SMALL = 1 << 21  # bytes of all logits that are computed in one go
EMPTY_CHANCE = 1e-12  # that some query loses all its keys: below, not worth a pass over the logits


class Plan:
    """In which order the B H matrices are computed: "outer, inner" instead of "batch, heads".

    The samples of one head (or the heads of one sample) lie at even distances in any of the usual layouts, so that
    one call multiplies them where they are; only where everything is small are all matrices joined, by a copy.
    """

    def __init__(self, q: Tensor, k: Tensor) -> None:
        self.batch, self.heads = q.shape[:2]
        self.matrix = 4 * q.shape[2] * k.shape[2]
        self.joined = self.batch * self.heads * self.matrix <= SMALL
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
        """Where to find matrices of outer inner ... whose logits fit the cache."""
        threads = torch.get_num_threads()
        room = max(threads, CACHE * max(2, threads) // max(1, self.matrix))
        for outer in range(x.shape[0]):
            for start in range(0, x.shape[1], room):
                yield outer, slice(start, min(start + room, x.shape[1]))


def part(x: Tensor, piece: tuple[int, slice]) -> Tensor:
    """The piece of outer inner ..., either of which may be 1 for all."""
    outer, inner = piece
    return x[outer if x.shape[0] > 1 else 0, inner if x.shape[1] > 1 else slice(None)]


class Masks:
    """Writes 0 and -inf: the bits of coin flips, or of a given mask, plus a bias."""

    def __init__(
        self,
        plan: Plan,
        weights: Tensor,
        bias: Optional[Tensor],
        drop: Optional[Tensor],
        seed: Tensor,
        threshold: Tensor,
    ) -> None:
        *_, queries, keys = weights.shape
        rows = plan.batch * plan.heads * queries
        self.bias, self.drop = (None if x is None else plan.split(x) for x in (bias, drop))
        self.integer, self.minus_inf = MINUS_INF[weights.dtype]
        self.next = 0  # row of the mask, in the order of the plan
        if drop is None:
            numbers = torch.arange(rows).view(plan.batch, plan.heads, queries, 1)
            self.rows = bernoulli.row_keys(seed, plan.split(numbers).reshape(-1))
            self.columns, self.limit = bernoulli.column_keys(keys, seed.device), bernoulli.as_limit(threshold)
            self.step = max(1, FLIPS * torch.get_num_threads() // max(1, keys))
            self.scratch = torch.empty(2, min(self.step, rows), keys, dtype=torch.int32)
        chance = float(bernoulli.as_ratio(threshold)) ** keys * rows
        self.may_be_empty = bias is not None or drop is not None or chance > EMPTY_CHANCE

    def write(self, logits: Tensor, piece: tuple[int, slice]) -> None:
        """logits: the piece, contiguous; pieces come in order."""
        if self.drop is not None:
            logits.copy_(additive(part(self.drop, piece), logits.dtype))
        else:
            self.flip(logits.view(self.integer).flatten(0, 1))
        if self.bias is not None:
            logits.add_(part(self.bias, piece))

    def flip(self, bits: Tensor) -> None:
        """Few rows at a time: their operands then stay in the nearest caches."""
        for start in range(0, len(bits), self.step):
            some = bits[start : start + self.step]
            hits, spare = self.scratch[:, : len(some)]
            if some.dtype == hits.dtype:
                hits = some
            bernoulli.fill(hits, self.rows[:, self.next : self.next + len(some)], self.columns, self.limit, spare)
            if some.dtype != hits.dtype:
                some.copy_(hits)
            some.mul_(self.minus_inf)
            self.next += len(some)


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
    """(output, weights): B H Q D, and what `backward` needs. `bias` and `drop` have four dimensions and broadcast;
    without `drop`, keys flip by seed and threshold."""
    plan = Plan(q, k)
    weights, out = plan.empty(q, q.shape[2], k.shape[2]), plan.empty(q, q.shape[2], v.shape[3])
    masks = Masks(plan, weights, bias, drop, seed, threshold)
    q, k, v = map(plan.split, (q, k, v))
    for piece in plan.pieces(q):
        logits = weights[piece]
        masks.write(logits, piece)
        logits.baddbmm_(q[piece], k[piece].transpose(1, 2), alpha=scale)
        softmax_(logits, masks.may_be_empty)
        torch.bmm(logits, v[piece], out=out[piece])
    return plan.merge(out), weights


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
    plan = Plan(q, k)
    dq, dk, dv = (plan.empty(x, *x.shape[2:]) for x in (q, k, v))
    shape, full = None if bias is None else bias.shape, torch.promote_types(q.dtype, torch.float32)
    dbias = None if bias is None else torch.zeros(plan.split(bias).shape, dtype=full)  # many small terms add up
    grad, q, k, v = map(plan.split, (grad, q, k, v))
    for piece in plan.pieces(q):
        p, g = weights[piece], grad[piece]
        torch.bmm(p.transpose(1, 2), g, out=dv[piece])
        d = torch.bmm(g, v[piece].transpose(1, 2))
        torch.ops.aten._softmax_backward_data.out(d, p, -1, p.dtype, grad_input=d)
        if dbias is not None:
            into = part(dbias, piece)
            into += d.to(full).sum_to_size(into.shape)
        for result, left, right in ((dq, d, k), (dk, d.transpose(1, 2), q)):
            torch.baddbmm(result[piece], left, right[piece], beta=0, alpha=scale, out=result[piece])
    dbias = torch.empty(0, dtype=full) if dbias is None else plan.merge(dbias).sum_to_size(shape)
    return *map(plan.merge, (dq, dk, dv)), dbias.contiguous()


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
    plan = Plan(q, k)
    return plan.merge(plan.empty(q, q.shape[2], v.shape[3])), plan.empty(q, q.shape[2], k.shape[2])


@backward_op.register_fake
def _(grad, q, k, v, weights, bias, scale):
    plan, full = Plan(q, k), torch.promote_types(q.dtype, torch.float32)
    dbias = q.new_empty((0,) if bias is None else bias.shape, dtype=full)
    return *(plan.merge(plan.empty(x, *x.shape[2:])) for x in (q, k, v)), dbias


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
