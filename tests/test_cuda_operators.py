"""The CUDA operators whole, host files included, run on the host emulation as torch.ops.flashprune_emulated."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import flashprune as fp
from flashprune import native, operators, selectors
from flashprune.cli import cases, validate
from inputs import DISTANCES, VARIANTS, Variant, exact, gaussian

LIBRARY = Path(native.__file__).parent / "libflashprune_emulated.so"
each_variant = pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])


def load() -> frozenset[str]:
    """Loads the library where it is built; the operators that it implements."""
    if LIBRARY.exists():
        torch.ops.load_library(LIBRARY)
    if not hasattr(torch.ops.flashprune_emulated, "topk_select"):
        return frozenset()
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return frozenset(op for op in operators.SHAPES if has_kernel(f"flashprune_emulated::{op}", "CPU"))


KERNELS = load()
pytestmark = pytest.mark.skipif(not KERNELS, reason="the emulated CUDA operators are not built")


@pytest.fixture(autouse=True)
def _cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """backend="cuda" of the public functions is the emulation, and takes CPU tensors."""

    def resolve(backend: str, op: str, *tensor: Any) -> str:
        assert backend == "cuda"
        if op not in KERNELS:
            pytest.skip(f"no CUDA kernel for {op} yet")
        return backend

    monkeypatch.setattr(selectors, "resolve", resolve)
    monkeypatch.setattr(operators, "namespace", lambda backend: torch.ops.flashprune_emulated)


def select(variant: Variant, features: Tensor, importance: Tensor, k: int | list[int], **more: Any) -> Tensor:
    return variant.select(features, importance, k, sort=False, backend="cuda", **more)


@each_variant
@each_dtype
@pytest.mark.parametrize("n", [1, 31, 64, 130])
def test_exact_numbers_to_the_last_index(variant: Variant, n: int, dtype: torch.dtype) -> None:
    features, importance = exact(variant, n)
    for k in {0, 1, n // 3, n}:
        expected = variant.define(features, importance, k, sort=False)
        assert torch.equal(select(variant, features.to(dtype), importance.to(dtype), k), expected), k


@pytest.mark.parametrize("variant", VARIANTS + DISTANCES, ids=lambda v: v.name)
@each_dtype
def test_random_numbers_within_rounding(variant: Variant, dtype: torch.dtype) -> None:
    features, importance = (x.to(dtype) for x in gaussian(150, 37))
    variant.check(features, importance, 40, select(variant, features, importance, 40))


@each_variant
def test_sorted_is_the_same_picks(variant: Variant) -> None:
    features, importance = exact(variant, 90)
    picks = select(variant, features, importance, 30)
    assert torch.equal(variant.select(features, importance, 30, backend="cuda"), picks.sort()[0])


@each_variant
@pytest.mark.parametrize("ks", [[9, 0, 4, 30], [5, 0, 5, 5], [4, 4, 4, 4], [0, 0, 0, 0]])
def test_packed_segments(variant: Variant, ks: list[int]) -> None:
    bounds = [0, 20, 20 if ks[1] == 0 else 24, 29, 90]
    features, importance = exact(variant, 90)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    got = select(variant, features, importance, ks, cu_seqlens=cu_seqlens)
    assert torch.equal(got, variant.define(features, importance, ks, sort=False, cu_seqlens=cu_seqlens))
    apart = torch.stack([cu_seqlens, cu_seqlens], 1)[:, 0]
    assert torch.equal(got, select(variant, features, importance, ks, cu_seqlens=apart))
    if "alpha" not in variant.settings and "pivots" not in variant.settings:
        for (start, end), k, picks in zip(pairwise(bounds), ks, got.split(ks), strict=True):
            alone = select(variant, features[start:end], importance[start:end], k)
            assert torch.equal(picks - start, alone)


@each_variant
def test_a_batch(variant: Variant) -> None:
    items = [exact(variant, 40, seed=seed) for seed in range(3)]
    features, importance = (torch.stack(x) for x in zip(*items, strict=True))
    got = select(variant, features, importance, 11)
    for picks, item in zip(got, items, strict=True):
        assert torch.equal(picks, variant.define(*item, 11, sort=False))
    assert select(variant, features[:0], importance[:0], 11).shape == (0, 11)


@each_variant
def test_strides_do_not_matter(variant: Variant) -> None:
    features, importance = exact(variant, 60)
    expected = select(variant, features, importance, 20)
    wide = torch.zeros(60, 40).index_copy(1, torch.arange(3, 19), features)[:, 3:19]
    spread = torch.stack([importance, importance], 1)[:, 0]
    for layout in (wide, features.T.contiguous().T, torch.stack([features, features], 2)[..., 0]):
        assert torch.equal(select(variant, layout, spread, 20), expected)


@pytest.mark.parametrize("name", ["d2pruner", "idpruner", "divprune", "cdpruner"])
def test_whole_methods(name: str) -> None:
    features, importance = gaussian(80, 64)
    inputs = (features,) if name == "divprune" else (features, importance)
    method = getattr(fp, name)
    assert torch.equal(method(*inputs, 20, backend="cuda"), _reference(method, *inputs, k=20))


def _reference(method: Any, *inputs: Tensor, k: int) -> Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selectors, "resolve", lambda *_: "reference")
        return method(*inputs, k, backend="reference")


@each_dtype
@pytest.mark.parametrize("op", cases.SELECTORS)
def test_what_validate_checks(op: str, dtype: torch.dtype) -> None:
    for case in cases.cases(op, seed=0, quick=True):
        inputs = tuple(x.to(dtype) for x in case.inputs)
        _, complaint = validate._check_selector(case, inputs, dict(case.params), "cuda")
        assert not complaint, f"{case.text}: {complaint}"


SCORES, FEATURES = torch.rand(9), torch.rand(9, 4)
BOUNDS = torch.tensor([0, 4, 9], dtype=torch.int32)
ERRORS = {
    "more than there are": ("topk", (SCORES, [10], None, True), r"k=10 exceeds N=9 in segment 0"),
    "negative": ("topk", (SCORES, [-1], None, True), r"k=-1 is negative"),
    "two budgets": ("topk", (SCORES, [1, 1], None, True), r"k: expected one entry without cu_seqlens, got 2"),
    "a budget too few": ("topk", (SCORES, [1], BOUNDS, True), r"k: expected one entry a segment, 2, got 1"),
    "all too many": ("topk", (SCORES, [6, 6], BOUNDS, True), r"k: segments of 9 tokens cannot give 12"),
    "no scores": ("topk", (FEATURES[None], [1], None, True), r"scores: expected \[N\] or \[B, N\], got \[1, 9, 4\]"),
    "packed batch": ("topk", (FEATURES, [1, 1], BOUNDS, True), r"scores: expected packed tokens .* got \[9, 4\]"),
    "int64 bounds": ("topk", (SCORES, [1, 1], BOUNDS.long(), True), r"cu_seqlens: expected int32 \[B \+ 1\]"),
    "two bounds": ("topk", (SCORES, [1, 1], BOUNDS[None], True), r"cu_seqlens: expected int32 \[B \+ 1\]"),
    "float64": ("topk", (SCORES.double(), [1], None, True), r"scores: expected float32, float16 or bfloat16"),
    "no features": ("mmr", (SCORES, SCORES, [1], None, 0.5, 1, True), r"features: expected \[N, D\] or \[B, N, D\]"),
    "importance": ("mmr", (FEATURES, SCORES[1:], [1], None, 0.5, 1, True), r"importance: expected \[9\], got \[8\]"),
    "int importance": ("mmr", (FEATURES, SCORES.int(), [1], None, 0.5, 1, True), r"importance: expected float32"),
    "lam": ("mmr", (FEATURES, SCORES, [1], None, 1.5, 1, True), r"lam: expected a number in \[0, 1\]"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_argument(case: str) -> None:
    method, arguments, message = ERRORS[case]
    with pytest.raises(ValueError, match=message):
        getattr(torch.ops.flashprune_emulated, f"{method}_select")(*arguments)


def test_every_host_file_is_in_both_libraries() -> None:
    if native.cuda_status() == "ready":
        assert operators.CUDA_KERNELS == KERNELS
