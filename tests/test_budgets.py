"""Budgets against worked examples and vLLM's published rule; masks."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import flashprune as fp


@pytest.mark.parametrize(
    ("n", "keep", "rule", "expected"),
    [
        (576, 0.25, "round", 144),
        (144, 0.1, "round", 14),
        (5, 0.5, "round", 2),  # halves to even, as Python rounds
        (7, 0.5, "round", 4),
        (5, 0.5, "floor", 2),
        (5, 0.5, "ceil", 3),
        (100, 0.29, "floor", 29),  # 28.999999999999996 in floats
        (100, 0.29, "ceil", 29),
        (30, 1.0, "ceil", 30),
        (10, 0.7, "floor", 7),
        (30, 0.1, "ceil", 3),  # 3.0000000000000004 in some orders of evaluation
        (10, 0.01, "round", 1),  # never nothing of something
        (10, 0.01, "floor", 1),
        (10, 0.0, "round", 0),
        (10, 0.0, "ceil", 0),
        (0, 0.5, "round", 0),
        (10, 1.0, "round", 10),
        (10, 1, "round", 1),  # an int is a count
        (10, 0, "round", 0),
        (10, 10, "ceil", 10),
    ],
)
def test_budget(n, keep, rule, expected):
    assert fp.budget(n, keep, rule=rule) == expected


def vllm_count(rule, tokens_per_frame, frames, q):
    """What `compute_retained_tokens_count` of vLLM 0.33 does, stated as a formula."""
    total = tokens_per_frame * frames
    least = tokens_per_frame if rule == "evs" else frames
    return max(least, int(total * (1 - q)))


@given(
    st.sampled_from(["evs", "vidcom2"]),
    st.integers(1, 2048),
    st.integers(1, 64),
    st.floats(0, 1, exclude_max=True),
)
def test_video_rules_are_vllms(rule, tokens_per_frame, frames, q):
    n = tokens_per_frame * frames
    kept = fp.budget(n, 1 - q, rule=rule, tokens_per_frame=tokens_per_frame)
    assert kept == vllm_count(rule, tokens_per_frame, frames, q)
    assert 0 <= kept <= n


def test_video_rules_of_an_empty_video():
    assert fp.budget(0, 0.5, rule="evs", tokens_per_frame=196) == 0
    assert fp.budget(0, 0.5, rule="vidcom2", tokens_per_frame=196) == 0


@given(st.integers(0, 10**6), st.floats(0, 1), st.sampled_from(["round", "floor", "ceil"]))
def test_budget_is_within_one_of_the_product(n, keep, rule):
    kept = fp.budget(n, keep, rule=rule)
    assert type(kept) is int
    assert 0 <= kept <= n
    assert abs(kept - n * keep) <= 1


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        ((1.5, 0.5), {}, TypeError, "n must be a host int"),
        ((-1, 0.5), {}, ValueError, "n=-1 must be at least 0"),
        ((10, "half"), {}, TypeError, "keep must be an int .a count. or a float .a ratio., got str"),
        ((10, True), {}, TypeError, "keep must be an int"),
        ((10, torch.tensor(3)), {}, TypeError, "keep must be an int"),
        ((10, 11), {}, ValueError, "keep=11 must lie between 0 and n=10"),
        ((10, -1), {}, ValueError, "keep=-1 must lie between 0 and n=10"),
        ((10, 1.5), {}, ValueError, r"keep=1.5 is a ratio"),
        ((10, math.nan), {}, ValueError, "keep=nan is a ratio"),
        ((10, 0.5), {"rule": "half"}, ValueError, "rule must be one of 'round', 'floor'.*got 'half'"),
        ((10, 0.5), {"rule": "evs"}, ValueError, "rule='evs' needs tokens_per_frame"),
        ((10, 0.5), {"rule": "vidcom2", "tokens_per_frame": 3}, ValueError, "tokens_per_frame=3 must divide n=10"),
        ((10, 0.5), {"rule": "evs", "tokens_per_frame": 0}, ValueError, "tokens_per_frame=0 must be at least 1"),
        ((10, 0.5), {"tokens_per_frame": 5}, ValueError, "tokens_per_frame belongs to .* got rule='round'"),
    ],
)
def test_wrong_budget_is_named(args, options, error, message):
    with pytest.raises(error, match=message):
        fp.budget(*args, **options)


def test_indices_to_mask():
    mask = fp.indices_to_mask(torch.tensor([4, 0]), 5)
    assert mask.tolist() == [True, False, False, False, True]
    rows = fp.indices_to_mask(torch.tensor([[0, 1], [2, 1]]), 3)
    assert rows.tolist() == [[True, True, False], [False, True, True]]
    assert fp.indices_to_mask(torch.empty(0, dtype=torch.int64), 2).tolist() == [False, False]
    assert fp.indices_to_mask(torch.empty(0, dtype=torch.int64), 0).shape == (0,)


@given(st.integers(1, 200).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1)))))
def test_mask_and_indices_are_inverse(case):
    n, kept = case
    indices = torch.tensor(sorted(kept), dtype=torch.int64)
    assert torch.equal(fp.indices_to_mask(indices, n).nonzero().flatten(), indices)


@pytest.mark.parametrize(
    ("indices", "n", "error", "message"),
    [
        ([0], 3, TypeError, "indices must be an int64 tensor, got list"),
        (torch.tensor([0], dtype=torch.int32), 3, TypeError, "indices must be an int64 tensor, got torch.int32"),
        (torch.tensor(0), 3, ValueError, r"indices must be \[K\] or \[B, K\], got \[\]"),
        (torch.tensor([0, 3]), 3, ValueError, "indices must lie between 0 and n-1=2, got 3"),
        (torch.tensor([-1, 2]), 3, ValueError, "indices must lie between 0 and n-1=2, got -1"),
        (torch.tensor([0]), -3, ValueError, "n=-3 must be at least 0"),
        (torch.tensor([0]), 3.0, TypeError, "n must be a host int"),
    ],
)
def test_wrong_mask_is_named(indices, n, error, message):
    with pytest.raises(error, match=message):
        fp.indices_to_mask(indices, n)


def test_compiled_mask():
    compiled = torch.compile(fp.indices_to_mask, fullgraph=True, backend="aot_eager")
    assert compiled(torch.tensor([1]), 3).tolist() == [False, True, False]
