"""What holds for every selector: one definition, whatever the backend, size, shape, dtype, strides or batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import flashprune as fp
from inputs import ADVERSARIAL, BY_NAME, DISTANCES, SIZES, VARIANTS, Variant, adversarial, exact, gaussian

each_variant = pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
every_variant = pytest.mark.parametrize("variant", VARIANTS + DISTANCES, ids=lambda v: v.name)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


@each_variant
@pytest.mark.parametrize("n", SIZES)
def test_exact_numbers_give_the_definition_to_the_last_index(variant: Variant, n: int, backend: str) -> None:
    features, importance = exact(variant, n, 16 if n < 1000 else 64)
    for k in {0, 1, n // 4, n} if n < 600 else {n // 5}:
        picks = variant.select(features, importance, k, sort=False, backend=backend)
        assert torch.equal(picks, variant.define(features, importance, k, sort=False)), f"k={k}"


@each_variant
@each_dtype
def test_exact_numbers_in_every_dtype(variant: Variant, dtype: torch.dtype, backend: str) -> None:
    features, importance = exact(variant, 200, 64, seed=5)
    picks = variant.select(features.to(dtype), importance.to(dtype), 70, sort=False, backend=backend)
    assert torch.equal(picks, variant.define(features, importance, 70, sort=False))


@every_variant
@each_dtype
@pytest.mark.parametrize(("n", "d", "k"), [(65, 7, 65), (300, 128, 100)])
def test_random_numbers_within_the_rounding_bound(
    variant: Variant, dtype: torch.dtype, n: int, d: int, k: int, backend: str
) -> None:
    features, importance = (x.to(dtype) for x in gaussian(n, d, seed=n))
    variant.check(features, importance, k, variant.select(features, importance, k, sort=False, backend=backend))


@every_variant
@pytest.mark.parametrize(("n", "d", "k"), [(1024, 33, 300), (2305, 1024, 200)])
def test_larger_segments_within_the_rounding_bound(variant: Variant, n: int, d: int, k: int, native: None) -> None:
    features, importance = gaussian(n, d, seed=n)
    variant.check(features, importance, k, variant.select(features, importance, k, sort=False, backend="cpu"))


@every_variant
@pytest.mark.parametrize("name", ADVERSARIAL)
def test_adversarial(variant: Variant, name: str, backend: str) -> None:
    features, importance = adversarial(name, 97)
    for k in (1, 31, 97):
        variant.check(features, importance, k, variant.select(features, importance, k, sort=False, backend=backend))


@every_variant
@pytest.mark.parametrize("name", ["duplicates", "same features", "equal scores", "zero rows", "odd scores"])
def test_ties_go_by_index_on_every_backend(variant: Variant, name: str, native: None) -> None:
    """Identical rows have identical scores, so rounding decides nothing between them."""
    features, importance = adversarial(name, 96)
    if name == "equal scores":
        features[48:] = features[:48].clone()
    picks = variant.select(features, importance, 40, sort=False, backend="cpu")
    for pick in range(len(picks)):
        twins = (_same(features, features[picks[pick]]) & _same(importance[:, None], importance[picks[pick]])).nonzero()
        earlier = [i for i in twins.flatten().tolist() if i < picks[pick] and i not in picks[:pick].tolist()]
        if "positions" not in variant.params(features, 40):  # tokens elsewhere are no twins
            assert not earlier, f"pick {pick}: token {int(picks[pick])} before its equals {earlier}"


def _same(rows: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    return ((rows == row) | (rows.isnan() & row.isnan())).all(-1)


@every_variant
def test_sorted_is_the_same_set_ascending(variant: Variant, backend: str) -> None:
    features, importance = gaussian(2, 150, 24)
    in_order = variant.select(features, importance, 60, sort=False, backend=backend)
    ascending = variant.select(features, importance, 60, backend=backend)
    assert torch.equal(ascending, in_order.sort().values)
    assert ascending.dtype == torch.int64 and ascending.shape == (2, 60)


@every_variant
def test_batch_is_item_by_item(variant: Variant, backend: str) -> None:
    features, importance = gaussian(5, 90, 20)
    batch = variant.select(features, importance, 33, sort=False, backend=backend)
    for item in range(5):
        one = variant.select(features[item], importance[item], 33, sort=False, backend=backend)
        assert torch.equal(batch[item], one)
    assert variant.select(features[:0], importance[:0], 33, backend=backend).shape == (0, 33)
    assert variant.select(features, importance, 0, backend=backend).shape == (5, 0)
    assert variant.select(features[:, :0], importance[:, :0], 0, backend=backend).shape == (5, 0)


@every_variant
def test_packed_is_segment_by_segment(variant: Variant, backend: str) -> None:
    sizes, ks = [40, 0, 1, 90, 0, 65, 12], [10, 0, 1, 90, 0, 7, 0]
    bounds = torch.tensor([0, *sizes]).cumsum(0)
    features, importance = gaussian(sum(sizes), 20)
    picks = _packed(variant, features, importance, ks, bounds, backend)
    for part, k, (start, end) in zip(picks.split(ks), ks, _spans(bounds), strict=True):
        rows = slice(start, end)
        params = _cut(variant.params(features, ks), rows, k, variant)
        select = getattr(fp, f"{variant.method}_select")
        one = select(*variant.tensors(features[rows], importance[rows]), k, sort=False, backend=backend, **params)
        assert torch.equal(part, start + one)
    variant.check(features, importance, ks, picks, cu_seqlens=bounds.int())


@each_variant
def test_packed_takes_one_k_for_all(variant: Variant, backend: str) -> None:
    features, importance = gaussian(90, 20)
    cu_seqlens = torch.tensor([0, 30, 40, 90], dtype=torch.int32)
    tensors, params = variant.tensors(features, importance), variant.params(features, 8)
    select = getattr(fp, f"{variant.method}_select")
    one = select(*tensors, 8, cu_seqlens=cu_seqlens, backend=backend, **params)
    assert torch.equal(one, select(*tensors, [8, 8, 8], cu_seqlens=cu_seqlens, backend=backend, **params))
    nothing = torch.zeros(1, dtype=torch.int32)
    empty = select(
        *(x[:0] for x in tensors), 8, cu_seqlens=nothing, backend=backend, **_cut(params, slice(0), 8, variant)
    )
    assert empty.shape == (0,) and empty.dtype == torch.int64


@every_variant
@each_dtype
def test_strides_and_alignment_change_nothing(variant: Variant, dtype: torch.dtype, backend: str) -> None:
    features, importance = (x.to(dtype) for x in gaussian(3, 70, 21))
    expected = variant.select(features, importance, 30, sort=False, backend=backend)
    wide = torch.full((3, 70, 40), torch.nan, dtype=dtype)
    wide[..., 3:24] = features
    turned = features.transpose(0, 1).contiguous().transpose(0, 1)
    columns = features.transpose(1, 2).contiguous().transpose(1, 2)
    every_other = torch.stack([importance, importance * 0], dim=-1)[..., 0]
    shifted = torch.empty(features.numel() + 1, dtype=dtype)[1:].view_as(features).copy_(features)
    for view in (wide[..., 3:24], turned, columns, shifted):
        assert torch.equal(variant.select(view, every_other, 30, sort=False, backend=backend), expected)
    expanded = variant.select(features[:1].expand(3, -1, -1), importance[:1].expand(3, -1), 30, backend=backend)
    assert torch.equal(expanded, variant.select(features[0], importance[0], 30, backend=backend).expand(3, -1))


@pytest.mark.parametrize("variant", [v for v in VARIANTS + DISTANCES if v.method != "topk"], ids=lambda v: v.name)
@pytest.mark.parametrize("data", ["random", "duplicates", "equal scores", "odd features", "exact"])
def test_any_block_size_gives_the_same_picks(variant: Variant, data: str, native: None) -> None:
    n = 300
    tokens = {"random": lambda: gaussian(n, 40), "exact": lambda: exact(variant, n)}
    features, importance = tokens.get(data, lambda: adversarial(data, n))()
    expected = variant.operator(features, importance, 120)
    for block in (1, 2, 3, 7, 32, 64, 100, 299, 300, 4096):
        assert torch.equal(variant.operator(features, importance, 120, block), expected), f"block={block}"


@every_variant
def test_every_run_is_the_same(variant: Variant, backend: str) -> None:
    features, importance = gaussian(2, 300, 48)
    expected = variant.select(features, importance, 90, sort=False, backend=backend)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, threads):
            torch.set_num_threads(count)
            assert torch.equal(variant.select(features, importance, 90, sort=False, backend=backend), expected)
    finally:
        torch.set_num_threads(threads)


@every_variant
def test_inputs_are_left_alone(variant: Variant, backend: str) -> None:
    features, importance = gaussian(100, 12)
    before = features.clone(), importance.clone()
    variant.select(features, importance, 30, backend=backend)
    assert torch.equal(features, before[0]) and torch.equal(importance, before[1])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_ragged_batches(data: st.DataObject) -> None:
    """Random ragged batches: bit-exact where the numbers allow it, within the bound elsewhere."""
    variant = data.draw(st.sampled_from(VARIANTS + DISTANCES))
    sizes = data.draw(st.lists(st.integers(0, 70), min_size=1, max_size=6))
    ks = [data.draw(st.integers(0, n)) for n in sizes]
    d, seed = data.draw(st.sampled_from([1, 3, 16, 64])), data.draw(st.integers(0, 1 << 20))
    bounds = torch.tensor([0, *sizes]).cumsum(0)
    is_exact = variant in VARIANTS and d in (16, 64) and data.draw(st.booleans())
    features, importance = exact(variant, sum(sizes), d, seed) if is_exact else gaussian(sum(sizes), d, seed=seed)
    for backend in ("reference", "cpu"):
        if fp.backends()[backend] == "ready":
            picks = _packed(variant, features, importance, ks, bounds, backend)
            if is_exact:
                exactly = variant.define(features, importance, ks, sort=False, cu_seqlens=bounds.int())
                assert torch.equal(picks, exactly)
            variant.check(features, importance, ks, picks, cu_seqlens=bounds.int())


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(sorted(BY_NAME)),
    shape=st.tuples(st.integers(0, 3), st.integers(0, 40), st.sampled_from([4, 16])),
    share=st.floats(0, 1),
    seed=st.integers(0, 1 << 20),
)
def test_any_shape(name: str, shape: tuple[int, int, int], share: float, seed: int) -> None:
    """Exactly k distinct tokens of every item, and the definition's."""
    variant, (b, n, d) = BY_NAME[name], shape
    flat, scores = exact(variant, b * n, d, seed)
    features, importance = flat.view(b, n, d), scores.view(b, n)
    k = int(share * n)
    for backend in ("reference", "cpu"):
        if fp.backends()[backend] == "ready":
            picks = variant.select(features, importance, k, sort=False, backend=backend)
            assert picks.shape == (b, k)
            assert torch.equal(picks, variant.define(features, importance, k, sort=False))


def _packed(
    variant: Variant,
    features: torch.Tensor,
    importance: torch.Tensor,
    ks: list[int],
    bounds: torch.Tensor,
    backend: str,
) -> torch.Tensor:
    return variant.select(features, importance, ks, cu_seqlens=bounds.int(), sort=False, backend=backend)


def _spans(bounds: torch.Tensor) -> list[tuple[int, int]]:
    return list(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True))


def _cut(params: dict, rows: slice, k: int, variant: Variant) -> dict:
    """A packed call's settings for one of its segments."""
    params = {name: value[rows] if name == "positions" else value for name, value in params.items()}
    return {**params, "pivots": int(k * variant.settings["pivots"])} if "pivots" in params else params
