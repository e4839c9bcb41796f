"""The backward half of `dropkey.operator.kernels`, whose docstring explains the names.

With p the weights and dout the gradient of the output: dv = pᵀ dout, ds = p (dout vᵀ - delta), dq = scale · ds k,
dk = scale · dsᵀ q, and the gradient of the bias is ds, summed over all places that share an entry of it.
"""

import triton
import triton.language as tl

from dropkey.operator.kernels import (
    INF,
    halves,
    load,
    load_threshold,
    logit_factor,
    masked_logits,
    matrix_of,
    row_halves,
    row_state,
    store,
)


@triton.jit
def prepare(
    out, dout, delta, seed, states, out_strides, dout_strides, heads, queries,
    WIDTH: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """For each query (B H Q) delta, the sum of out * dout over D, which the softmax subtracts from the gradient of its
    weights; and its `row_state`, if `states` is given."""
    blocks = tl.cdiv(queries, ROWS)
    pair, start = tl.program_id(0) // blocks, (tl.program_id(0) % blocks) * ROWS
    batch, head = pair // heads, pair % heads
    o = load(matrix_of(out, out_strides, batch, head), out_strides[2], start, queries, ROWS, WIDTH, D, True)
    do = load(matrix_of(dout, dout_strides, batch, head), dout_strides[2], start, queries, ROWS, WIDTH, D, True)
    m = start + tl.arange(0, ROWS)
    sums = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    row = tl.cast(pair, tl.int64) * queries + m
    tl.store(delta + row, sums, mask=m < queries)
    if states is not None:
        tl.store(states + row, row_state(seed, row).to(tl.int64, bitcast=True), mask=m < queries)


@triton.jit
def backward_keys(
    q, k, v, bias, seed, threshold, states, dout, lse, delta, dq, dk, dv, scale,
    q_strides, k_strides, v_strides, bias_strides, dout_strides, dq_strides, dk_strides, dv_strides,
    heads, queries, keys,
    DROP: tl.constexpr, COLUMN: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
    WIDTH: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ALONE: tl.constexpr,
):  # fmt: skip
    """dk and dv of one block of keys. ALONE: it is the only block, so that dq is complete too.

    Tiles are transposed, COLUMNS x ROWS, as the products that give dk and dv read them from registers. Every thread
    then sees many queries, which is why their states are loaded (from `prepare`) and not computed again. Keys beyond
    the last give rows that are not stored; they are checked only where dq sums over them (ALONE).
    """
    blocks = tl.cdiv(keys, COLUMNS)
    pair, begin = tl.program_id(0) // blocks, (tl.program_id(0) % blocks) * COLUMNS
    batch, head = pair // heads, pair % heads
    q, dq = matrix_of(q, q_strides, batch, head), matrix_of(dq, dq_strides, batch, head)
    dout, bias = matrix_of(dout, dout_strides, batch, head), matrix_of(bias, bias_strides, batch, head)
    limit, row = load_threshold(threshold), tl.cast(pair, tl.int64) * queries
    key = load(matrix_of(k, k_strides, batch, head), k_strides[2], begin, keys, COLUMNS, WIDTH, D, True)
    value = load(matrix_of(v, v_strides, batch, head), v_strides[2], begin, keys, COLUMNS, WIDTH, D, True)
    n = (begin + tl.arange(0, COLUMNS))[:, None]
    dkey, dvalue = tl.full([COLUMNS, WIDTH], 0.0, tl.float32), tl.full([COLUMNS, WIDTH], 0.0, tl.float32)
    for start in range(0, queries, ROWS):
        m = start + tl.arange(0, ROWS)
        query = load(q, q_strides[2], start, queries, ROWS, WIDTH, D, True)
        do = load(dout, dout_strides[2], start, queries, ROWS, WIDTH, D, True)
        level = tl.load(lse + row + m, mask=m < queries, other=INF)
        inner = tl.load(delta + row + m, mask=m < queries, other=0.0)
        if states is not None:
            state = tl.load(states + row + m, mask=m < queries, other=0)
            first, second = halves(state.to(tl.uint64, bitcast=True)[None, :])
        else:
            first, second = row_halves(seed, pair, m[None, :], queries, DROP, COLUMN)
        s = tl.dot(key, tl.trans(query), input_precision=PRECISION)
        s = masked_logits(
            s, m[None, :], n, first, second, limit, bias, bias_strides, scale, queries, keys, DROP, BIAS, ALONE
        )
        p = tl.exp2(s * logit_factor(scale, BIAS) - level[None, :])
        dvalue = tl.dot(p.to(do.dtype), do, dvalue, input_precision=PRECISION)
        dp = tl.dot(value, tl.trans(do), input_precision=PRECISION)
        ds = (p * (dp - inner[None, :])).to(query.dtype)
        dkey = tl.dot(ds, query, dkey, input_precision=PRECISION)
        if ALONE:
            tile = tl.dot(tl.trans(ds), key, input_precision=PRECISION) * scale
            store(dq, dq_strides[2], start, queries, tile, ROWS, WIDTH, D)
    store(matrix_of(dk, dk_strides, batch, head), dk_strides[2], begin, keys, dkey * scale, COLUMNS, WIDTH, D)
    store(matrix_of(dv, dv_strides, batch, head), dv_strides[2], begin, keys, dvalue, COLUMNS, WIDTH, D)


@triton.jit
def gradient_tile(
    query, do, key, value, level, inner, m, n, first, second, limit, bias, bias_strides, scale, queries, keys,
    DROP: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile of logits (bias included, scale applied): ROWS x COLUMNS."""
    s = tl.dot(query, tl.trans(key), input_precision=PRECISION)
    s = masked_logits(
        s, m[:, None], n, first, second, limit, bias, bias_strides, scale, queries, keys, DROP, BIAS, BOUNDED
    )
    p = tl.exp2(s * logit_factor(scale, BIAS) - level[:, None])
    dp = tl.dot(do, tl.trans(value), input_precision=PRECISION)
    return p * (dp - inner[:, None])


@triton.jit
def accumulate_dq(
    dquery, query, do, k, v, level, inner, m, start, stop, first, second, limit, bias, k_strides, v_strides,
    bias_strides, scale, queries, keys,
    DROP: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr, COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr, D: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """Adds the keys start .. stop to dquery."""
    for begin in range(start, stop, COLUMNS):
        n = (begin + tl.arange(0, COLUMNS))[None, :]
        key = load(k, k_strides[2], begin, keys, COLUMNS, WIDTH, D, BOUNDED)
        value = load(v, v_strides[2], begin, keys, COLUMNS, WIDTH, D, BOUNDED)
        ds = gradient_tile(
            query, do, key, value, level, inner, m, n, first, second, limit, bias, bias_strides, scale, queries, keys,
            DROP, BIAS, PRECISION, BOUNDED,
        )  # fmt: skip
        dquery = tl.dot(ds.to(key.dtype), key, dquery, input_precision=PRECISION)
    return dquery


@triton.jit
def backward_queries(
    q, k, v, bias, seed, threshold, dout, lse, delta, dq, scale,
    q_strides, k_strides, v_strides, bias_strides, dout_strides, dq_strides, heads, queries, keys,
    DROP: tl.constexpr, COLUMN: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
    WIDTH: tl.constexpr, D: tl.constexpr, RAGGED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dq of one block of queries."""
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
    do = load(matrix_of(dout, dout_strides, batch, head), dout_strides[2], start, queries, ROWS, WIDTH, D, True)
    row = tl.cast(pair, tl.int64) * queries + m
    level = tl.load(lse + row, mask=m < queries, other=INF)
    inner = tl.load(delta + row, mask=m < queries, other=0.0)
    dquery = tl.full([ROWS, WIDTH], 0.0, tl.float32)
    whole = keys // COLUMNS * COLUMNS
    dquery = accumulate_dq(
        dquery, query, do, k, v, level, inner, m, 0, whole, first, second, limit, bias, k_strides, v_strides,
        bias_strides, scale, queries, keys, DROP, BIAS, PRECISION, COLUMNS, WIDTH, D, False,
    )  # fmt: skip
    if RAGGED:
        dquery = accumulate_dq(
            dquery, query, do, k, v, level, inner, m, whole, keys, first, second, limit, bias, k_strides, v_strides,
            bias_strides, scale, queries, keys, DROP, BIAS, PRECISION, COLUMNS, WIDTH, D, True,
        )  # fmt: skip
    store(matrix_of(dq, dq_strides, batch, head), dq_strides[2], start, queries, dquery * scale, ROWS, WIDTH, D)


@triton.jit
def backward_bias(
    q, k, v, bias, seed, threshold, dout, lse, delta, dbias, scale,
    q_strides, k_strides, v_strides, bias_strides, dout_strides, dbias_shape, batches, heads, queries, keys,
    DROP: tl.constexpr, COLUMN: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
    WIDTH: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    EACH_M: tl.constexpr, EACH_N: tl.constexpr,
):  # fmt: skip
    """One tile of dbias (contiguous, of dbias_shape): the sum of the logits' gradients over all places that share an
    entry of the bias, in a fixed order. EACH_M, EACH_N: the bias differs along queries, along keys."""
    down, across = tl.cdiv(dbias_shape[2], ROWS), tl.cdiv(dbias_shape[3], COLUMNS)
    program = tl.program_id(0)
    column, program = (program % across) * COLUMNS, program // across
    row, program = (program % down) * ROWS, program // down
    own_head, own_batch = program % dbias_shape[1], program // dbias_shape[1]
    limit = load_threshold(threshold)
    total = tl.full([ROWS, COLUMNS], 0.0, tl.float32)
    # A dimension that the bias has takes one step, at this program's place; one that it lacks is summed over.
    for batch in range(own_batch, batches, dbias_shape[0]):
        for head in range(own_head, heads, dbias_shape[1]):
            k_, v_ = matrix_of(k, k_strides, batch, head), matrix_of(v, v_strides, batch, head)
            q_, do_ = matrix_of(q, q_strides, batch, head), matrix_of(dout, dout_strides, batch, head)
            bias_ = matrix_of(bias, bias_strides, batch, head)
            pair = batch * heads + head
            for start in range(row, row + 1 if EACH_M else queries, ROWS):
                m = start + tl.arange(0, ROWS)
                first, second = row_halves(seed, pair, m[:, None], queries, DROP, COLUMN)
                query = load(q_, q_strides[2], start, queries, ROWS, WIDTH, D, True)
                do = load(do_, dout_strides[2], start, queries, ROWS, WIDTH, D, True)
                place = tl.cast(pair, tl.int64) * queries + m
                level = tl.load(lse + place, mask=m < queries, other=INF)
                inner = tl.load(delta + place, mask=m < queries, other=0.0)
                for begin in range(column, column + 1 if EACH_N else keys, COLUMNS):
                    n = (begin + tl.arange(0, COLUMNS))[None, :]
                    key = load(k_, k_strides[2], begin, keys, COLUMNS, WIDTH, D, True)
                    value = load(v_, v_strides[2], begin, keys, COLUMNS, WIDTH, D, True)
                    total += gradient_tile(
                        query, do, key, value, level, inner, m, n, first, second, limit, bias_, bias_strides, scale,
                        queries, keys, DROP, BIAS, PRECISION, True,
                    )  # fmt: skip
    i, j = (row + tl.arange(0, ROWS))[:, None], (column + tl.arange(0, COLUMNS))[None, :]
    if not EACH_M:
        total, i = tl.sum(total, 0, keep_dims=True), tl.full([1, 1], 0, tl.int32)
    if not EACH_N:
        total, j = tl.sum(total, 1, keep_dims=True), tl.full([1, 1], 0, tl.int32)
    matrix = dbias + (tl.cast(own_batch, tl.int64) * dbias_shape[1] + own_head) * dbias_shape[2] * dbias_shape[3]
    places = matrix + tl.cast(i, tl.int64) * dbias_shape[3] + j
    tl.store(places, total.to(dbias.dtype.element_ty), mask=(i < dbias_shape[2]) & (j < dbias_shape[3]))
