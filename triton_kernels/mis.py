"""Greedy maximal independent set in order of importance.

Candidates stand in order of priority, which never changes, and go through in panels of up to 4096 a segment. A panel
takes three launches: `strike` multiplies its candidates with every pick so far, `adjacency` with each other (half of
the square, a bit a pair), and `sweep`, one program a segment, walks the bits 32 candidates at a time: rows that meet a
kept one are struck all at once, the 32 x 32 block on the diagonal is settled one by one in registers. N·K·D + N·P·D / 2
multiply-adds for N candidates, K picks and panels of P, at most T·P / 8 bytes of bits: never N². A segment whose budget
is spent costs empty programs only. `finish` fills by priority and writes the indices.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .adjacency import Graph, adjacency, edge_tile, pack_bits
from .configs import config
from .host_ints import host_ints
from .launch import cdiv, kernel, padded
from .order import ordered_bits
from .similarity import segment_bounds


@triton.jit
def first_word(start, segment):
    """Where a segment's words of one bit a candidate begin, in a buffer of T / 32 + segments + 1 words."""
    return start // 32 + segment


@kernel
def strike_kernel(
    x_ptr,
    inverse_ptr,
    positions_ptr,
    diagonal_ptr,
    order_ptr,
    cu_ptr,
    left_ptr,
    budgets_ptr,
    picks_ptr,
    struck_ptr,
    panel,
    words,
    suppress,
    T,
    per_item,
    item_stride,
    row_stride,
    D,
    scale,
    offset,
    alpha,
    beta,
    threshold,
    kind,
    radius,
    temporal_radius,
    falloff,
    SPATIAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Strike the candidates of one panel that are neighbours of a pick of an earlier one."""
    row = tl.program_id(0)
    segment = tl.program_id(2)
    segments = tl.num_programs(2)
    start, end = segment_bounds(cu_ptr, segment, T)
    k = tl.minimum(tl.load(budgets_ptr + segment), end - start)
    left = tl.load(left_ptr + segment)
    skipped = tl.where(suppress != 0, 0, tl.load(budgets_ptr + segments + segment))
    first = panel + row * BLOCK_N  # of the segment's candidates
    column = skipped + tl.program_id(1) * BLOCK_N  # of the segment's picks
    if (start + first < end) & (left > 0) & (column < k - left):
        offs_m = start + first + tl.arange(0, BLOCK_N)
        offs_n = column + tl.arange(0, BLOCK_N)
        mask_m = offs_m < end
        mask_n = offs_n < k - left
        tokens_m = tl.load(order_ptr + offs_m, mask=mask_m, other=0)
        tokens_n = tl.load(picks_ptr + start + offs_n, mask=mask_n, other=0)
        diagonal = tl.load(diagonal_ptr + segment)
        edges = edge_tile(
            x_ptr, inverse_ptr, positions_ptr, tokens_m, tokens_n, mask_m, mask_n, per_item, item_stride, row_stride,
            D, scale, offset, alpha, beta, threshold, kind, radius, temporal_radius, falloff, diagonal,
            SPATIAL, BLOCK_D, PRECISION, UPCAST,
        )  # fmt: skip
        struck = tl.max(edges, 1)  # [BM]
        offs_w = first_word(start, segment) + first // 32 + tl.arange(0, BLOCK_N // 32)
        inside = first + 32 * tl.arange(0, BLOCK_N // 32) < end - start
        tl.atomic_or(struck_ptr + offs_w, pack_bits(tl.reshape(struck, [BLOCK_N // 32, 32])), mask=inside)


@kernel
def sweep_kernel(
    bits_ptr,
    struck_ptr,
    order_ptr,
    cu_ptr,
    budgets_ptr,
    left_ptr,
    picks_ptr,
    taken_ptr,
    panel,
    suppress,
    T,
    WORDS: tl.constexpr,
):
    """Settle one panel of each segment; one program a segment."""
    segment = tl.program_id(0)
    segments = tl.num_programs(0)
    start, end = segment_bounds(cu_ptr, segment, T)
    n = end - start
    k = tl.minimum(tl.load(budgets_ptr + segment), n)
    pivots = tl.load(budgets_ptr + segments + segment)
    count = k - tl.load(left_ptr + segment)
    lanes = tl.arange(0, 32)
    offs_w = tl.arange(0, WORDS)
    kept = tl.zeros([WORDS], tl.int32)  # candidates of this panel that strike their neighbours
    for block in range(0, tl.cdiv(tl.minimum(n - panel, 32 * WORDS), 32)):
        if count < k:
            first = panel + 32 * block
            offs_r = first + lanes
            mask = (offs_r < n)[:, None] & (offs_w <= block)[None, :]
            rows = tl.load(
                bits_ptr + (start + offs_r).to(tl.int64)[:, None] * WORDS + offs_w[None, :], mask=mask, other=0
            )
            hit = tl.max(((rows & kept[None, :]) != 0).to(tl.int32), 1)  # [32]
            word = first_word(start, segment) + first // 32
            struck = tl.load(struck_ptr + word) | tl.sum(hit << lanes, 0)
            taken = 0
            strikers = 0
            before = count
            for i in tl.static_range(32):
                own = tl.load(
                    bits_ptr + (start + first + i).to(tl.int64) * WORDS + block, mask=first + i < n, other=0
                )  # its later half is never met: strikers come before
                pivot = first + i < pivots
                free = (((struck >> i) & 1) | (own & strikers)) == 0
                take = (first + i < n) & (count < k) & (pivot | free)
                count += take.to(tl.int32)
                taken |= take.to(tl.int32) << i
                strikers |= (take & ((suppress != 0) | (first + i >= pivots))).to(tl.int32) << i
            kept = tl.where(offs_w == block, strikers, kept)
            tl.store(taken_ptr + word, taken)
            mine = (taken >> lanes) & 1
            tokens = tl.load(order_ptr + start + offs_r, mask=mine != 0, other=0)
            tl.store(picks_ptr + start + before + tl.cumsum(mine, 0) - mine, tokens, mask=mine != 0)
    tl.store(left_ptr + segment, k - count)


@kernel
def finish_kernel(
    order_ptr,
    cu_ptr,
    budgets_ptr,
    left_ptr,
    taken_ptr,
    chosen_ptr,
    out_ptr,
    local,
    sort,
    T,
    CHUNK: tl.constexpr,
):
    """Fill each segment's budget by priority and write its indices; one program a segment."""
    segment = tl.program_id(0)
    segments = tl.num_programs(0)
    start, end = segment_bounds(cu_ptr, segment, T)
    n = end - start
    k = tl.minimum(tl.load(budgets_ptr + segment), n)
    left = tl.load(left_ptr + segment)
    out_ptr += tl.load(budgets_ptr + 2 * segments + segment)
    shift = tl.where(local != 0, start, 0)
    found = 0
    passed = 0
    for chunk in range(0, n, CHUNK):
        offs = chunk + tl.arange(0, CHUNK)
        mask = offs < n
        words = tl.load(taken_ptr + first_word(start, segment) + offs // 32, mask=mask, other=0)
        kept = (words >> (offs % 32)) & 1
        rest = tl.where(mask, 1 - kept, 0)
        place = tl.where(kept != 0, found + tl.cumsum(kept, 0), k - left + passed + tl.cumsum(rest, 0)) - 1
        chosen = mask & (place < k)
        tokens = tl.load(order_ptr + start + offs, mask=mask, other=0)
        tl.store(chosen_ptr + tokens, chosen.to(tl.int8), mask=mask & (sort != 0))
        tl.store(out_ptr + place, (tokens - shift).to(tl.int64), mask=chosen & (sort == 0))
        found += tl.sum(kept, 0)
        passed += tl.sum(rest, 0)
    if sort != 0:
        tl.debug_barrier()  # the marks of all threads are read back in order of index
        placed = 0
        for chunk in range(start, end, CHUNK):
            offs = chunk + tl.arange(0, CHUNK)
            chosen = tl.load(chosen_ptr + offs, mask=offs < end, other=0).to(tl.int32)
            place = placed + tl.cumsum(chosen, 0) - 1
            tl.store(out_ptr + place, (offs - shift).to(tl.int64), mask=(chosen != 0) & (place < k))
            placed += tl.sum(chosen, 0)


@kernel
def prepare_kernel(
    scores_ptr,
    cu_ptr,
    keys_ptr,
    budgets_ptr,
    left_ptr,
    T,
    segments,
    steps,
    k,
    pivots,
    uniform,
    BLOCK: tl.constexpr,
):
    """Keys that sort the tokens by segment and falling importance; of each segment what is left to pick, its budget.

    If all segments have the same budgets their table is filled here.
    """
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    low = tl.zeros([BLOCK], tl.int32)
    high = low + segments
    for _ in range(0, steps):  # the segments that end at or before a token, by bisection
        middle = (low + high) // 2
        searching = low < high
        behind = tl.load(cu_ptr + 1 + middle, mask=searching, other=0) <= offs
        low = tl.where(searching & behind, middle + 1, low)
        high = tl.where(searching & (behind == 0), middle, high)
    falling = 4294967295 - ordered_bits(tl.load(scores_ptr + offs, mask=offs < T, other=0.0).to(tl.float32))
    tl.store(keys_ptr + offs, (low.to(tl.int64) << 32) | falling, mask=offs < T)

    mask = offs < segments
    start = tl.minimum(tl.maximum(tl.load(cu_ptr + offs, mask=mask, other=0), 0), T)
    end = tl.minimum(tl.maximum(tl.load(cu_ptr + offs + 1, mask=mask, other=0), start), T)
    count = tl.load(budgets_ptr + offs, mask=mask & (uniform == 0), other=k)
    tl.store(left_ptr + offs, tl.minimum(count, end - start), mask=mask)
    tl.store(budgets_ptr + offs, count, mask=mask & (uniform != 0))
    tl.store(budgets_ptr + segments + offs, tl.zeros_like(offs) + pivots, mask=mask & (uniform != 0))
    tl.store(budgets_ptr + 2 * segments + offs, offs * k, mask=mask & (uniform != 0))


def prepare(
    importance: Tensor, starts: Tensor, ks: Sequence[int], pivots: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """What the other stages go by, without synchronising.

    Returns:
        order: int32 ``[tokens]``: segment by segment, the flat tokens from most to least important, ties by index.
        budgets: int32 ``[3 * segments]``: k, pivots, and where the segment's indices begin in the output.
        left: int32 ``[segments]``: k, or the length of a shorter segment, as `segment_bounds` sees it.
    """
    scores = importance.reshape(-1).contiguous()
    tokens, segments = scores.shape[0], starts.shape[0] - 1
    keys = torch.empty(tokens, dtype=torch.int64, device=scores.device)
    left = torch.empty(segments, dtype=torch.int32, device=scores.device)
    uniform = len(set(ks)) == 1 and len(set(pivots)) == 1
    if uniform:
        budgets = torch.empty(3 * segments, dtype=torch.int32, device=scores.device)
    else:
        budgets = host_ints([*ks, *pivots, *itertools.accumulate(ks[:-1], initial=0)], scores.device)
    block = config("prepare", scores)
    prepare_kernel[(cdiv(max(tokens, segments), block["BLOCK"]),)](
        scores, starts, keys, budgets, left, tokens, segments, segments.bit_length(), ks[0], pivots[0],
        int(uniform), **block,
    )  # fmt: skip
    return keys.sort(stable=True).indices.int(), budgets, left


def mis_select(
    features: Tensor,
    importance: Tensor,
    k: Sequence[int],
    positions: Tensor | None,
    cu_seqlens: Tensor | None,
    alpha: float,
    threshold: float,
    similarity: str,
    proximity: str,
    radius: int,
    sigma: float,
    temporal_radius: int,
    pivots: Sequence[int],
    pivots_suppress: bool,
    sort: bool,
    panel_words: int | None = None,
) -> Tensor:
    """``flashprune.mis_select`` on checked arguments.

    ``panel_words``, a power of two, is the width of a panel in words of 32 candidates, no less than a tile of cosines;
    it changes no pick.
    """
    graph = Graph.build(
        features, positions, cu_seqlens, alpha, threshold, similarity, proximity, radius, sigma, temporal_radius
    )
    tokens, segments, device = graph.tokens, graph.starts.shape[0] - 1, features.device
    shape = (sum(k),) if cu_seqlens is not None else (*features.shape[:-2], k[0])
    out = torch.zeros(shape, dtype=torch.int64, device=device)
    if not out.numel() or not tokens:
        return out
    order, budgets, left = prepare(importance, graph.starts, k, pivots)
    longest = tokens if cu_seqlens is not None else features.shape[-2]
    sweep = config("sweep", features, longest)
    if panel_words:
        sweep = sweep | {"WORDS": panel_words}
    words = sweep["WORDS"]
    bits = torch.empty(tokens, words, dtype=torch.int32, device=device)
    struck, taken = torch.zeros(2, padded(tokens // 32 + segments + 1), dtype=torch.int32, device=device).unbind()
    picks = torch.empty(tokens, dtype=torch.int32, device=device)
    diagonals, tile = graph.diagonals(), graph.tile["BLOCK_N"]
    for panel in range(0, longest, 32 * words):
        if panel:
            rows = cdiv(min(32 * words, longest - panel), tile)
            columns = cdiv(min(max(k), panel), tile)
            graph.launch(
                strike_kernel, (rows, columns, segments), order, graph.starts, left, budgets, picks, struck,
                diagonals=diagonals, panel=(panel, words, int(pivots_suppress)),
            )  # fmt: skip
        adjacency(graph, order, left, bits, diagonals, panel)
        sweep_kernel[(segments,)](
            bits, struck, order, graph.starts, budgets, left, picks, taken, panel, int(pivots_suppress), tokens, **sweep
        )  # fmt: skip
    chosen = torch.zeros(tokens, dtype=torch.int8, device=device)
    finish_kernel[(segments,)](
        order, graph.starts, budgets, left, taken, chosen, out, int(cu_seqlens is None), int(sort), tokens,
        **config("finish", features),
    )  # fmt: skip
    return out
