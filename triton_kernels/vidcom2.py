"""VidCom2: the tokens least like the mean of their video and of their frame, more of them from frames that stand out.

*Moments* and *variances*: the variance of every channel, by pieces of the tokens, joined in order; top-k finds the
steadiest half. *Norms*, *centres* and *centre*: the means of the normalised tokens, over these channels, of every frame
and of the video. *Similarities*: each token's distances to both. *Frame means* and *budgets*: how many tokens each
frame may keep. *Ranks*: a token's rank in its frame decides whether it is within the budget, which goes into the order
of its score; the last top-k chooses. The features are read four times, the last three only over half of the channels.
Sums have a fixed order, and every number of a launch follows from the shapes: the host waits for nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import config
from .launch import cdiv, kernel, padded
from .similarity import inverse_norm, strided_rows
from .topk import topk_select

PIECES = 32  # of the tokens, for the variances
TEMPERATURE = tl.constexpr(0.01)


@kernel
def moments_kernel(
    x_ptr, means_ptr, squares_ptr, tokens, pieces, row_stride, D, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """Mean, and sum of squared deviations from it, of some channels over one piece of the tokens."""
    offs_d = tl.program_id(0) * COLS + tl.arange(0, COLS)
    piece = tl.program_id(1)
    mask_d = offs_d < D
    begin = piece * tokens // pieces
    end = (piece + 1) * tokens // pieces
    # apart from the first row, so that a channel that never changes has variance 0 exactly
    first = tl.load(x_ptr + begin.to(tl.int64) * row_stride + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    mean = tl.zeros([COLS], tl.float32)
    squares = tl.zeros([COLS], tl.float32)
    for start in range(begin, end, ROWS):
        offs_n = start + tl.arange(0, ROWS)
        mask = (offs_n < end)[:, None] & mask_d[None, :]
        x = tl.load(x_ptr + offs_n.to(tl.int64)[:, None] * row_stride + offs_d[None, :], mask=mask, other=0.0)
        x = tl.where(mask, x.to(tl.float32) - first[None, :], 0.0)  # [ROWS, COLS]
        count = tl.minimum(end - start, ROWS).to(tl.float32)
        before = (start - begin).to(tl.float32)
        tile_mean = tl.sum(x, 0) / count
        apart = tl.where(mask, x - tile_mean[None, :], 0.0)
        step = tile_mean - mean
        share = count / (before + count)
        mean += step * share
        squares += tl.sum(apart * apart, 0) + step * step * before * share
    out = piece.to(tl.int64) * D + offs_d
    tl.store(means_ptr + out, first + mean, mask=mask_d)
    tl.store(squares_ptr + out, squares, mask=mask_d)


@kernel
def variances_kernel(means_ptr, squares_ptr, out_ptr, tokens, pieces, D, BLOCK: tl.constexpr):
    """Minus the variance of every channel, of which top-k takes the highest."""
    offs_d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs_d < D
    mean = tl.zeros([BLOCK], tl.float32)
    squares = tl.zeros([BLOCK], tl.float32)
    for piece in range(0, pieces):
        begin = piece * tokens // pieces
        count = ((piece + 1) * tokens // pieces - begin).to(tl.float32)
        before = begin.to(tl.float32)
        offs = tl.cast(piece, tl.int64) * D + offs_d
        step = tl.load(means_ptr + offs, mask=mask, other=0.0) - mean
        share = count / (before + count)
        mean += step * share
        squares += tl.load(squares_ptr + offs, mask=mask, other=0.0) + step * step * before * share
    tl.store(out_ptr + offs_d, -squares / tokens, mask=mask)


@kernel
def norms_kernel(x_ptr, channels_ptr, inverse_ptr, tokens, row_stride, C, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """`inverse_norm` of every token over the channels."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < tokens
    rows = x_ptr + offs_n.to(tl.int64) * row_stride
    squares = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in range(0, C, BLOCK_D):
        offs_c = start + tl.arange(0, BLOCK_D)
        channels = tl.load(channels_ptr + offs_c, mask=offs_c < C, other=0)
        mask = mask_n[:, None] & (offs_c < C)[None, :]
        x = tl.load(rows[:, None] + channels[None, :], mask=mask, other=0.0).to(tl.float32)
        squares += x * x
    tl.store(inverse_ptr + offs_n, inverse_norm(tl.sum(squares, 1)), mask=mask_n)


@kernel
def centres_kernel(
    x_ptr, channels_ptr, inverse_ptr, centres_ptr, places, row_stride, C, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """The mean of one frame's normalised tokens, over some of the channels."""
    frame = tl.program_id(0)
    offs_c = tl.program_id(1) * COLS + tl.arange(0, COLS)
    mask_c = offs_c < C
    channels = tl.load(channels_ptr + offs_c, mask=mask_c, other=0)
    total = tl.zeros([ROWS, COLS], tl.float32)
    for start in range(0, places, ROWS):
        offs_n = start + tl.arange(0, ROWS)
        tokens = frame.to(tl.int64) * places + offs_n
        inverse = tl.load(inverse_ptr + tokens, mask=offs_n < places, other=0.0)
        mask = (inverse > 0)[:, None] & mask_c[None, :]  # a row that has no norm is not read
        x = tl.load(x_ptr + tokens[:, None] * row_stride + channels[None, :], mask=mask, other=0.0).to(tl.float32)
        total += x * inverse[:, None]
    tl.store(centres_ptr + frame.to(tl.int64) * C + offs_c, tl.sum(total, 0) / places, mask=mask_c)


@kernel
def centre_kernel(centres_ptr, centre_ptr, frames, C, BLOCK: tl.constexpr):
    """The mean of the frames' centres, which is that of all tokens."""
    offs_c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs_c < C
    total = tl.zeros([BLOCK], tl.float32)
    for frame in range(0, frames):
        total += tl.load(centres_ptr + tl.cast(frame, tl.int64) * C + offs_c, mask=mask, other=0.0)
    tl.store(centre_ptr + offs_c, total / frames, mask=mask)


@triton.jit
def closeness(squared):
    """A sum of Gaussians of a squared distance, of variances 1/8 to 2."""
    near = tl.exp(-4.0 * squared) + tl.exp(-2.0 * squared) + tl.exp(-squared)
    return near + tl.exp(-0.5 * squared) + tl.exp(-0.25 * squared)


@kernel
def similarities_kernel(
    x_ptr, channels_ptr, inverse_ptr, centres_ptr, centre_ptr, similarity_ptr, to_video_ptr,
    places, row_stride, C, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Closeness to the video, and the sum of it and that to the frame, of some tokens of one frame."""
    frame = tl.program_id(0)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < places
    tokens = frame.to(tl.int64) * places + offs_n
    inverse = tl.load(inverse_ptr + tokens, mask=mask_n, other=0.0)
    rows = x_ptr + tokens * row_stride
    centres_ptr += frame.to(tl.int64) * C
    # [BN, BD]
    from_video = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    from_frame = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in range(0, C, BLOCK_D):
        offs_c = start + tl.arange(0, BLOCK_D)
        mask_c = offs_c < C
        channels = tl.load(channels_ptr + offs_c, mask=mask_c, other=0)
        mask = (inverse > 0)[:, None] & mask_c[None, :]
        x = tl.load(rows[:, None] + channels[None, :], mask=mask, other=0.0).to(tl.float32) * inverse[:, None]
        apart = x - tl.load(centre_ptr + offs_c, mask=mask_c, other=0.0)[None, :]
        from_video += apart * apart
        apart = x - tl.load(centres_ptr + offs_c, mask=mask_c, other=0.0)[None, :]
        from_frame += apart * apart
    near = closeness(tl.sum(from_video, 1))
    tl.store(to_video_ptr + tokens, near, mask=mask_n)
    tl.store(similarity_ptr + tokens, near + closeness(tl.sum(from_frame, 1)), mask=mask_n)


@kernel
def frame_means_kernel(to_video_ptr, means_ptr, places, BLOCK: tl.constexpr):
    frame = tl.program_id(0)
    to_video_ptr += frame.to(tl.int64) * places
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, places, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        total += tl.load(to_video_ptr + offs, mask=offs < places, other=0.0)
    tl.store(means_ptr + frame, tl.sum(total, 0) / places)


@triton.jit
def frame_weights(means_ptr, start, frames, least, BLOCK: tl.constexpr):
    """What some frames weigh in the softmax, before it is normalised."""
    offs = start + tl.arange(0, BLOCK)
    means = tl.load(means_ptr + offs, mask=offs < frames, other=float("inf"))
    return tl.exp((least - means) / TEMPERATURE)


@kernel
def budgets_kernel(means_ptr, budgets_ptr, frames, places, keep, BLOCK: tl.constexpr):
    """Tokens for each frame, in one program: four passes over the frames, the last three from the cache."""
    lowest = tl.full([BLOCK], float("inf"), tl.float32)
    for start in range(0, frames, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        lowest = tl.minimum(lowest, tl.load(means_ptr + offs, mask=offs < frames, other=float("inf")))
    least = tl.min(lowest, 0)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, frames, BLOCK):
        total += frame_weights(means_ptr, start, frames, least, BLOCK)
    whole = tl.sum(total, 0)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, frames, BLOCK):
        total += frame_weights(means_ptr, start, frames, least, BLOCK) / whole
    mean = tl.sum(total, 0) / frames
    for start in range(0, frames, BLOCK):
        weights = frame_weights(means_ptr, start, frames, least, BLOCK) / whole
        wanted = tl.minimum(keep * (1 + weights - mean), 1.0) * places
        down = tl.floor(wanted)
        rest = wanted - down
        odd = down - 2 * tl.floor(down / 2)
        up = (rest > 0.5) | ((rest == 0.5) & (odd > 0))  # halves to even
        budget = tl.minimum(tl.maximum(down.to(tl.int32) + up.to(tl.int32), 1), places)
        offs = start + tl.arange(0, BLOCK)
        tl.store(budgets_ptr + offs, budget, mask=offs < frames)


@kernel
def ranks_kernel(similarity_ptr, budgets_ptr, out_ptr, places, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Scores for the last choice: within a frame's budget before beyond it, then less similar before more.

    A similarity is positive, so its bits rise with it. Their distance from those of a large float, taken as a float
    again, falls; it is positive, and with all bits kept, for the tokens within the budget. The others have minus their
    similarity.
    """
    frame = tl.program_id(0)
    first = frame.to(tl.int64) * places
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    similarity = tl.load(similarity_ptr + first + rows, mask=rows < places, other=0.0)
    rank = tl.zeros([ROWS], tl.int32)
    for start in range(0, places, COLS):
        cols = start + tl.arange(0, COLS)
        others = tl.load(similarity_ptr + first + cols, mask=cols < places, other=float("inf"))
        # [ROWS, COLS]
        equal = (others[None, :] == similarity[:, None]) & (cols[None, :] < rows[:, None])
        before = (others[None, :] < similarity[:, None]) | equal
        rank += tl.sum(before.to(tl.int32), 1)
    within = rank < tl.load(budgets_ptr + frame)
    inverted = (0x7F000000 - similarity.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    tl.store(out_ptr + first + rows, tl.where(within, inverted, -similarity), mask=rows < places)


def steady_channels(features: Tensor) -> Tensor:
    """int64, ascending: the half of the channels of ``[N, D]`` whose variance is lowest."""
    features, tokens, _, row_stride = strided_rows(features)
    d, pieces = features.shape[1], min(PIECES, tokens)
    means, squares = features.new_empty((2, padded(pieces * d)), dtype=torch.float32)
    steadiness = features.new_empty(d, dtype=torch.float32)
    block = config("moments", features)
    moments_kernel[(cdiv(d, block["COLS"]), pieces)](features, means, squares, tokens, pieces, row_stride, d, **block)
    block = config("video", features)
    variances_kernel[(cdiv(d, block["BLOCK"]),)](means, squares, steadiness, tokens, pieces, d, **block)
    return topk_select(steadiness, [max(1, d // 2)], None, True)


def similarities(features: Tensor, channels: Tensor, frames: int) -> tuple[Tensor, Tensor]:
    """float32 ``[N]`` similarity of each token to video and frame, and ``[T]`` of each frame to the video."""
    features, tokens, _, row_stride = strided_rows(features)
    c, places = len(channels), tokens // frames
    inverse, similarity, to_video = features.new_empty((3, padded(tokens)), dtype=torch.float32)[:, :tokens]
    centres, centre = features.new_empty((frames, c), dtype=torch.float32), similarity.new_empty(c)
    frame_means = similarity.new_empty(frames)
    block = config("frames", features)
    norms_kernel[(cdiv(tokens, block["BLOCK_N"]),)](features, channels, inverse, tokens, row_stride, c, **block)
    tile, line = config("moments", features), config("video", features)
    centres_kernel[(frames, cdiv(c, tile["COLS"]))](features, channels, inverse, centres, places, row_stride, c, **tile)
    centre_kernel[(cdiv(c, line["BLOCK"]),)](centres, centre, frames, c, **line)
    similarities_kernel[(frames, cdiv(places, block["BLOCK_N"]))](
        features, channels, inverse, centres, centre, similarity, to_video, places, row_stride, c, **block
    )
    frame_means_kernel[(frames,)](to_video, frame_means, places, **line)
    return similarity, frame_means


def vidcom2_select(features: Tensor, frames: int, keep: float, k: int, sort: bool) -> Tensor:
    """int64 ``[k]`` of features ``[N, D]``, frame after frame; ``keep`` is a frame's mean share."""
    features = strided_rows(features)[0]
    similarity, frame_means = similarities(features, steady_channels(features), frames)
    places = len(similarity) // frames
    budgets = torch.empty(frames, dtype=torch.int32, device=features.device)
    budgets_kernel[(1,)](frame_means, budgets, frames, places, keep, **config("video", features))
    scores, block = torch.empty_like(similarity), config("ranks", similarity)
    ranks_kernel[(frames, cdiv(places, block["ROWS"]))](similarity, budgets, scores, places, **block)
    return topk_select(scores, [k], None, sort)
