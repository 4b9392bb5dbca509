"""Replays of one segment's selection in float64, judging each pick by what rounding may have decided.

Each replay takes the segment's picks in their order and yields a `Finding` for every pick that is not the best one by
float64 arithmetic. A finding is legal when no other token is better by more than the rounding bounds of the two scores
together. Where a score takes no arithmetic (top-k, a first pick by importance) the bound is zero and the total order
itself must hold, ties by index included.

Bounds, with eps of the working precision (float32: 2**-23) and D features:

- a cosine is off by at most (sqrt(D) + 8) * eps: rounding errors of a sum of D products add up like a random walk
  (Higham and Mary, 2019), with a factor of two to spare, and two norms are divided out. Tensor cores cut off instead,
  so that errors would add up: the CUDA kernels let them sum a few products only, which costs at most 28 eps whatever D
  is (4 on random rows in the tests; csrc/include/flashprune/tile.cuh);
- mmr, mis and maxmin add a few eps of the terms that they combine with it;
- dpp: gains are Schur complements of the kernel. With w the coefficients that best express token i by the picks and
  q**2 the sum of (w_s r_s)**2, independent errors u * r_a * r_b of the kernel's entries move the gain of token i by
  about u * (2 |r_i| q + q**2). Here u = (sqrt(D) / 8 + sqrt(step) / 8 + 2) * eps: a cosine's typical error, as many
  average out, and that of the factor's inner products. Subtracting once a step adds (2 + sqrt(step)) * eps * L_ii.
  The reference stays below two thirds of this on random, correlated and low-rank features. Spent tokens are judged
  alike: within the bound of DPP_RANK_TOL a token may count either way.

Products of elements of tiny rows are subnormal, all with one absolute error: those of a row whose squared norm is s,
above the limit where it counts as zero, move its cosines by up to D * eps * tiny / s, with tiny the smallest normal
number; the bounds of a segment have that of its smallest row added. Whether a row counts as zero is decided by its
squared norm in the working precision: within that one's rounding of either limit, underflow or overflow, a backend may
decide otherwise than a replay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .reference.segments import DPP_RANK_TOL, nearness, norms, ranked, valid_rows


@dataclass(frozen=True)
class Finding:
    """A pick that is not the best: what it costs, and what rounding explains."""

    step: int
    regret: float
    bound: float
    legal: bool
    text: str


def cosine_bound(features: Tensor) -> float:
    """How far a cosine computed in the precision of ``features [N, D]`` may be off."""
    return (math.sqrt(features.shape[-1]) + 8) * torch.finfo(features.dtype).eps + underflow_bound(features)


def underflow_bound(features: Tensor) -> float:
    """What of it is due to products that are subnormal."""
    info, lengths = torch.finfo(features.dtype), norms(features).double()
    least = float(torch.where(lengths > 0, lengths, math.inf).min()) if len(lengths) else math.inf
    return features.shape[-1] * info.eps * info.tiny / least**2


def topk(picks: Tensor, scores: Tensor, *, sort: bool) -> Iterator[Finding]:
    expected = ranked(scores)[: len(picks)]
    if sort:
        yield from _same_set(picks, expected, scores, "token")
    else:
        yield from _in_order(picks, expected, scores, 0, "score")


def mmr(picks: Tensor, features: Tensor, importance: Tensor, *, lam: float, per_round: int) -> Iterator[Finding]:
    unit, eps, weights = _units(features), torch.finfo(features.dtype).eps, importance.double()
    alive = torch.ones_like(weights, dtype=torch.bool)
    nearest = torch.full_like(weights, -math.inf)
    scores, errors, columns = weights, torch.zeros_like(weights), _columns(unit, picks)
    for start in range(0, len(picks), per_round):
        for step, pick in enumerate(picks[start : start + per_round].tolist(), start):
            yield from _judge(step, pick, scores, errors, alive)
            alive[pick] = False
            nearest = torch.maximum(nearest, next(columns))
        scores = lam * weights - (1 - lam) * nearest
        rounding = 2 * eps * (lam * weights.abs() + (1 - lam) * nearest.abs())
        errors = torch.where(scores.isfinite(), (1 - lam) * cosine_bound(features) + rounding, 0.0)


def maxmin(picks: Tensor, features: Tensor) -> Iterator[Finding]:
    unit = _units(features)
    alive = torch.ones_like(unit[:, 0], dtype=torch.bool)
    errors = torch.full_like(unit[:, 0], cosine_bound(features) + torch.finfo(features.dtype).eps)
    scores = 1 - _nearest_other(unit) if len(picks) else errors
    nearest = torch.full_like(errors, -math.inf)
    for (step, pick), column in zip(enumerate(picks.tolist()), _columns(unit, picks), strict=True):
        yield from _judge(step, pick, scores, errors, alive)
        alive[pick] = False
        nearest = torch.maximum(nearest, column)
        scores = 1 - nearest


def dpp(picks: Tensor, features: Tensor, relevance: Tensor) -> Iterator[Finding]:
    unit, eps, weights = _units(features), torch.finfo(features.dtype).eps, relevance.double()
    underflow = underflow_bound(features)
    rounded = torch.where(valid_rows(features), relevance * relevance, 0.0).double()  # may overflow, as in a selection
    diagonal = torch.where(rounded.isfinite() & (rounded > 0), weights * weights, rounded)
    gains, floor = diagonal.clone(), DPP_RANK_TOL * diagonal
    alive = torch.ones_like(weights, dtype=torch.bool)
    factor = weights.new_zeros(len(picks), len(weights))  # [step, token], rows of the Cholesky factor
    mix = torch.zeros_like(factor)  # how the picks express each token, scaled by the picks' relevance
    for step, pick in enumerate(picks.tolist()):
        spread = (mix[:step] ** 2).sum(0).sqrt()
        inner = (math.sqrt(features.shape[-1]) / 8 + math.sqrt(step) / 8 + 2) * eps + underflow
        errors = (2 + math.sqrt(step)) * eps * diagonal + inner * spread * (2 * weights.abs() + spread)
        errors = torch.where(gains.isfinite(), errors.nan_to_num(math.inf), 0.0)
        fresh = alive & (gains - errors > floor)  # not spent by any rounding
        if alive[pick] and gains[pick] + errors[pick] > floor[pick]:
            yield from _judge(step, pick, gains, errors, fresh, "gain")
        elif fresh.any():
            best = int(ranked(gains, fresh)[0])
            regret, bound = float(gains[best] - gains[pick]), float(errors[best])
            yield Finding(step, regret, bound, False, f"spent token {pick} taken while token {best} has a gain left")
        else:
            first = int(ranked(weights, alive)[0])
            yield from _in_order(picks[step : step + 1], torch.tensor([first]), weights, step, "relevance")
        alive[pick] = False
        if gains[pick] > 1e-12 * diagonal[pick]:  # below, float64 itself holds nothing but noise
            row = weights * (unit @ unit[pick]) * weights[pick]
            update = (row - factor[:step, pick] @ factor[:step]) / gains[pick].sqrt()
            share = update / gains[pick].sqrt()
            mix[:step] -= share * mix[:step, pick, None]
            mix[step] = share * weights[pick].abs()
            factor[step] = update
            gains = gains - update * update


def mis(
    picks: Tensor,
    features: Tensor,
    importance: Tensor,
    positions: Tensor | None,
    *,
    pivots: int,
    sort: bool,
    alpha: float,
    threshold: float,
    similarity: str,
    proximity: str,
    radius: int,
    sigma: float,
    temporal_radius: int,
    pivots_suppress: bool,
) -> Iterator[Finding]:
    """Walks all tokens in order of importance; ``sort`` says that ``picks`` is a set, its order unknown."""
    unit, order = _units(features), ranked(importance)
    bound = alpha * cosine_bound(features) + (8 + abs(threshold)) * torch.finfo(features.dtype).eps

    def weights(i: int) -> Tensor:
        cosines = unit @ unit[i]
        similar = cosines if similarity == "cosine" else (1 + cosines) / 2
        if positions is None:
            return alpha * similar
        where = torch.tensor(i)
        near = nearness(positions, where, torch.float64, proximity, radius, sigma, temporal_radius)
        return alpha * similar + (1 - alpha) * near

    first = order[:pivots]
    if sort:
        yield from _same_set(picks, first, importance, "pivot")
    else:
        yield from _in_order(picks[:pivots], first, importance, 0, "importance")
    heaviest = unit.new_full((len(unit),), -math.inf)  # edge of each token to the tokens taken so far
    if pivots_suppress:
        for pivot in first.tolist():
            heaviest = torch.maximum(heaviest, weights(pivot))
    walk = _walk_set if sort else _walk
    yield from walk(picks, order, importance, pivots, heaviest, weights, threshold, bound)


def _walk(
    picks: Tensor,
    order: Tensor,
    importance: Tensor,
    pivots: int,
    heaviest: Tensor,
    weights: Callable[[int], Tensor],
    threshold: float,
    bound: float,
) -> Iterator[Finding]:
    """Independent set and filling of a selection in pick order."""
    step = pivots
    for candidate in order[pivots:].tolist():
        if step == len(picks):
            return
        excess = float(heaviest[candidate]) - threshold  # above 0: struck
        if int(picks[step]) == candidate and excess <= bound:
            if excess > 0:
                yield Finding(step, excess, bound, True, f"token {candidate} taken beside a kept neighbour")
            heaviest = torch.maximum(heaviest, weights(candidate))
            step += 1
        elif excess < -bound:
            text = f"token {candidate} has no kept neighbour, yet token {int(picks[step])} is taken"
            yield Finding(step, -excess, bound, False, text)
            return
        elif excess <= 0:
            yield Finding(step, -excess, bound, True, f"token {candidate} struck without a kept neighbour")
    rest = torch.ones_like(importance, dtype=torch.bool)
    rest[picks[:step]] = False
    yield from _in_order(picks[step:], ranked(importance, rest)[: len(picks) - step], importance, step, "importance")


def _walk_set(
    picks: Tensor,
    order: Tensor,
    importance: Tensor,
    pivots: int,
    heaviest: Tensor,
    weights: Callable[[int], Tensor],
    threshold: float,
    bound: float,
) -> Iterator[Finding]:
    """Independent set and filling of a set whose order is not known: a kept token near the threshold may be either."""
    kept = torch.zeros_like(importance, dtype=torch.bool)
    kept[picks] = True
    left = int(kept[order[pivots:]].sum())  # kept tokens that the walk has not met
    possible = heaviest.clone()  # as heaviest, counting tokens that may have been taken
    filled = None  # the last token that is surely filling
    skipped = None  # the first token left out
    for step, candidate in enumerate(order[pivots:].tolist(), pivots):
        if left == 0 and filled is None:
            return  # the budget may have ended here
        if kept[candidate]:
            left -= 1
            if float(heaviest[candidate]) - threshold > bound:
                filled = candidate
                if skipped is not None:
                    text = f"token {candidate} fills the budget before token {skipped}, which is more important"
                    yield Finding(step, float(importance[skipped] - importance[candidate]), 0.0, False, text)
                    return
                continue
            row = weights(candidate)
            if float(possible[candidate]) - threshold < -bound:
                heaviest = torch.maximum(heaviest, row)
            possible = torch.maximum(possible, row)
        else:
            skipped = candidate if skipped is None else skipped
            lack = threshold - float(possible[candidate])
            if lack > bound:
                yield Finding(step, lack, bound, False, f"token {candidate} has no kept neighbour, yet is left out")
                return


def _same_set(picks: Tensor, expected: Tensor, scores: Tensor, what: str) -> Iterator[Finding]:
    """``expected`` among ``picks``, exactly."""
    missing = expected[~torch.isin(expected, picks)].tolist()
    if missing:
        yield Finding(0, math.inf, 0.0, False, f"{what} {missing[0]} with {float(scores[missing[0]])} is left out")


def _in_order(picks: Tensor, expected: Tensor, scores: Tensor, first_step: int, what: str) -> Iterator[Finding]:
    """``picks`` as expected, exactly: nothing was computed that rounding could excuse."""
    wrong = (picks != expected).nonzero().flatten().tolist()
    if wrong:
        pick, best = int(picks[wrong[0]]), int(expected[wrong[0]])
        keys = torch.where(scores.isnan(), -math.inf, scores).double()
        regret = 0.0 if keys[pick] == keys[best] else float(keys[best] - keys[pick])
        rule = "comes first by index" if regret == 0 else f"has {what} {float(scores[best])}"
        text = f"token {pick} with {what} {float(scores[pick])} taken where token {best} {rule}"
        yield Finding(first_step + wrong[0], regret, 0.0, False, text)


def _judge(
    step: int, pick: int, scores: Tensor, errors: Tensor, rivals: Tensor, what: str = "score"
) -> Iterator[Finding]:
    """The pick against all ``rivals``: beaten only if a rival comes first whatever the errors did to both."""
    keys = torch.where(scores.isnan(), -math.inf, scores)
    others = rivals.nonzero().flatten()
    others = others[others != pick]
    if not len(others):
        return
    best = int(others[ranked(keys[others])[0]])
    regret = 0.0 if keys[pick] == keys[best] else float(keys[best] - keys[pick])
    if regret < 0 or (regret == 0 and pick < best):
        return
    low, high = keys[others] - errors[others], keys[pick] + errors[pick]
    beaten = (low > high) | ((low == high) & (others < pick))
    if beaten.any():
        best = int(others[beaten][ranked(low[beaten])[0]])
        regret = 0.0 if keys[pick] == keys[best] else float(keys[best] - keys[pick])
    bound = float(errors[best] + errors[pick])
    rule = "and comes first by index" if regret == 0 else f"has {what} {float(keys[best]):.9g}"
    text = f"token {pick} with {what} {float(keys[pick]):.9g} taken where token {best} {rule}"
    yield Finding(step, regret, bound, not bool(beaten.any()), text)


def _units(features: Tensor) -> Tensor:
    """Unit rows in float64; which rows are valid is decided in the features' own precision, as in a selection."""
    wide = features.double()
    lengths = (wide * wide).sum(-1, keepdim=True).sqrt()
    return torch.where(valid_rows(features)[:, None], wide / lengths, 0.0)


def _columns(unit: Tensor, picks: Tensor) -> Iterator[Tensor]:
    """Cosines of all rows to each pick in turn, computed for many picks at once."""
    for block in picks.split(64):
        yield from (unit @ unit[block].T).unbind(1)


def _nearest_other(unit: Tensor) -> Tensor:
    rows = []
    for start, block in enumerate(unit.split(256)):
        cosines = block @ unit.T
        cosines[:, start * 256 : start * 256 + len(block)].fill_diagonal_(-math.inf)
        rows.append(cosines.amax(1))
    return torch.cat(rows)
