"""Triton kernels of DropKey attention: FlashAttention-2 in tiles, with keys dropped inside the tile.

Shapes: B batch, H heads, Q queries, K keys, D head width; m counts queries, n keys, `pair` is b * H + h. A program
works on one pair and one block of queries or keys; tiles are ROWS queries by COLUMNS keys. Logits are in units of
log 2 (exp2 is one instruction), sums and accumulators in fp32. The B·H·Q·K weights are not kept: backward computes
them again from q, k and `lse`, the log2 of the sum of each query's weights (+inf for a query without keys, which makes
all its weights 0).

Whether a key is dropped depends on (seed, b, h, m, n) alone, never on the tiling, the device or the kernel, so that
forward and backward agree without storing a mask. There are no atomic additions, so gradients are bitwise reproducible.

Source: FlashAttention-2 (Dao, arXiv 2307.08691) for the tiling; DropKey (Li et al., CVPR 2023), algorithm 1.
"""

import triton
import triton.language as tl

NO_BIAS, ADDITIVE, BOOLEAN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
LOG2_E = tl.constexpr(1.4426950408889634)
INF = tl.constexpr(float("inf"))


# --------------------------------------------------------------------------------------------------------- the mask


@triton.jit
def mix(z):
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014), a bijection of uint64: every input bit changes half of the
    output bits on average."""
    z ^= z >> 30
    z *= 0xBF58476D1CE4E5B9
    z ^= z >> 27
    z *= 0x94D049BB133111EB
    z ^= z >> 31
    return z


@triton.jit
def row_state(seed, row):
    """The uint64 of each row (int64) of the mask. Costly, therefore computed once per row."""
    return mix(mix(tl.load(seed).to(tl.uint64, bitcast=True)) + row.to(tl.uint64) * 0x9E3779B97F4A7C15)


@triton.jit
def halves(state):
    return state.to(tl.uint32), (state >> 32).to(tl.uint32)


@triton.jit
def drops(first, second, n, threshold):
    """True where key n is dropped, given the halves of a row's state: four instructions per key.

    A sum or a xor alone would drop similar keys in rows with similar states; their product does not.
    """
    c = n.to(tl.uint32) * 0x9E3779B1
    x = (first + c) * (second ^ c)
    return x.to(tl.int32, bitcast=True) < threshold


@triton.jit
def load_threshold(threshold):
    """The threshold (ratio * 2^32 in memory) minus 2^31, for a comparison of signed int32."""
    limit = 0
    if threshold is not None:
        limit = (tl.load(threshold) - 2147483648).to(tl.int32)
    return limit


@triton.jit
def draw(seed, threshold, out, rows, columns, first_column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The mask itself: rows x columns bytes, contiguous, 1 where dropped."""
    blocks = tl.cdiv(columns, COLUMNS)
    row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(0) % blocks) * COLUMNS + tl.arange(0, COLUMNS)
    first, second = halves(row_state(seed, row))
    drop = drops(first[:, None], second[:, None], (first_column + column)[None, :], load_threshold(threshold))
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    tl.store(out + row[:, None] * columns + column[None, :], drop.to(tl.uint8), mask=inside)


# ------------------------------------------------------------------------------------------------------------ tiles


@triton.jit
def matrix_of(pointer, strides, batch, head):
    """The first element of the matrix of a sample and head. In 64 bits: B H N D may exceed 2^31 elements."""
    if pointer is not None:
        pointer = pointer + tl.cast(batch, tl.int64) * strides[0] + tl.cast(head, tl.int64) * strides[1]
    return pointer


@triton.jit
def load(matrix, stride, start, count, ROWS: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, BOUNDED: tl.constexpr):
    """Rows start .. start + ROWS of a matrix of `count` rows, D wide: ROWS x WIDTH, 0 beyond its rows and width."""
    i, d = tl.arange(0, ROWS)[:, None], tl.arange(0, WIDTH)[None, :]
    pointers = matrix + tl.cast(start, tl.int64) * stride + i * stride + d
    if BOUNDED:
        inside = start + i < count
        if D < WIDTH:
            inside = inside & (d < D)
        tile = tl.load(pointers, mask=inside, other=0.0)
    elif D < WIDTH:
        tile = tl.load(pointers, mask=d < D, other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def store(matrix, stride, start, count, tile, ROWS: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """The inverse of `load`, rounded to the matrix's dtype."""
    i, d = tl.arange(0, ROWS)[:, None], tl.arange(0, WIDTH)[None, :]
    pointers = matrix + tl.cast(start, tl.int64) * stride + i * stride + d
    tl.store(pointers, tile.to(matrix.dtype.element_ty), mask=(start + i < count) & (d < D))


@triton.jit
def row_halves(seed, pair, m, queries, DROP: tl.constexpr, COLUMN: tl.constexpr):
    """The two halves of the states of queries m. With COLUMN all queries of a pair share one state; without DROP there
    is nothing to draw."""
    first, second = 0, 0
    if DROP and COLUMN:
        first, second = halves(row_state(seed, tl.cast(pair, tl.int64)))
    elif DROP:
        first, second = halves(row_state(seed, tl.cast(pair, tl.int64) * queries + m))
    return first, second


@triton.jit
def masked_logits(
    s, m, n, first, second, threshold, bias, bias_strides, scale, queries, keys,
    DROP: tl.constexpr, BIAS: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """The logits from the products of q and k, up to the factor `logit_factor`; -inf where dropped.

    Queries m and keys n have shapes that broadcast to that of s, in either order. With BOUNDED some keys may lie beyond
    the last; their logits are -inf too. `threshold` is as loaded by `load_threshold`.
    """
    if BIAS != NO_BIAS:
        places = bias + tl.cast(m, tl.int64) * bias_strides[2] + tl.cast(n, tl.int64) * bias_strides[3]
        b = tl.load(places, mask=(m < queries) & (n < keys), other=0)
        s = (s * scale + b.to(tl.float32)) * LOG2_E if BIAS == ADDITIVE else tl.where(b != 0, s, -INF)
    if DROP:
        s = tl.where(drops(first, second, n, threshold), -INF, s)
    if BOUNDED:
        s = tl.where(n < keys, s, -INF)
    return s


@triton.jit
def logit_factor(scale, BIAS: tl.constexpr):
    """The factor that `masked_logits` leaves out. Without an additive bias that is the scale: the multiplication then
    fuses with the subtraction before the exponential."""
    factor = scale * LOG2_E
    if BIAS == ADDITIVE:
        factor = 1.0
    return factor


# ---------------------------------------------------------------------------------------------------------- forward


@triton.jit
def accumulate(
    acc, total, peak, query, k, v, bias, first, second, threshold, scale, k_strides, v_strides, bias_strides,
    m, start, stop, queries, keys,
    DROP: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr, COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr, D: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """Adds the keys start .. stop to the weighted sum of values `acc`, the sum of weights `total` and the greatest
    logit `peak` (online softmax)."""
    factor = logit_factor(scale, BIAS)
    for begin in range(start, stop, COLUMNS):
        n = (begin + tl.arange(0, COLUMNS))[None, :]
        key = load(k, k_strides[2], begin, keys, COLUMNS, WIDTH, D, BOUNDED)
        s = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        s = masked_logits(
            s, m[:, None], n, first, second, threshold, bias, bias_strides, scale, queries, keys, DROP, BIAS, BOUNDED
        )
        higher = tl.maximum(peak, tl.max(s, 1) * factor)
        level = tl.where(higher == -INF, 0.0, higher)  # no key so far; -inf - -inf would be NaN
        shrink = tl.exp2(peak - level)
        p = tl.exp2(s * factor - level[:, None])
        total = total * shrink + tl.sum(p, 1)
        value = load(v, v_strides[2], begin, keys, COLUMNS, WIDTH, D, BOUNDED)
        acc = tl.dot(p.to(value.dtype), value, acc * shrink[:, None], input_precision=PRECISION)
        peak = higher
    return acc, total, peak


@triton.jit
def forward(
    q, k, v, bias, seed, threshold, out, lse, scale, q_strides, k_strides, v_strides, bias_strides, out_strides,
    heads, queries, keys,
    DROP: tl.constexpr, COLUMN: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
    WIDTH: tl.constexpr, D: tl.constexpr, RAGGED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """`out` and `lse` (B H Q) of one block of queries. RAGGED: the last block of keys ends beyond the last key; only
    that block checks it."""
    blocks = tl.cdiv(queries, ROWS)
    pair, start = tl.program_id(0) // blocks, (tl.program_id(0) % blocks) * ROWS
    batch, head = pair // heads, pair % heads
    k, v, bias = (
        matrix_of(k, k_strides, batch, head),
        matrix_of(v, v_strides, batch, head),
        matrix_of(bias, bias_strides, batch, head),
    )
    m = start + tl.arange(0, ROWS)
    first, second = row_halves(seed, pair, m[:, None], queries, DROP, COLUMN)
    limit = load_threshold(threshold)
    query = load(matrix_of(q, q_strides, batch, head), q_strides[2], start, queries, ROWS, WIDTH, D, True)
    acc = tl.full([ROWS, WIDTH], 0.0, tl.float32)
    total, peak = tl.full([ROWS], 0.0, tl.float32), tl.full([ROWS], -INF, tl.float32)
    whole = keys // COLUMNS * COLUMNS
    acc, total, peak = accumulate(
        acc, total, peak, query, k, v, bias, first, second, limit, scale, k_strides, v_strides, bias_strides,
        m, 0, whole, queries, keys, DROP, BIAS, PRECISION, COLUMNS, WIDTH, D, False,
    )  # fmt: skip
    if RAGGED:
        acc, total, peak = accumulate(
            acc, total, peak, query, k, v, bias, first, second, limit, scale, k_strides, v_strides, bias_strides,
            m, whole, keys, queries, keys, DROP, BIAS, PRECISION, COLUMNS, WIDTH, D, True,
        )  # fmt: skip
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    tile = acc / total[:, None]
    store(matrix_of(out, out_strides, batch, head), out_strides[2], start, queries, tile, ROWS, WIDTH, D)
    place = lse + tl.cast(pair, tl.int64) * queries + m
    tl.store(place, tl.where(empty, INF, peak + tl.log2(total)), mask=m < queries)
