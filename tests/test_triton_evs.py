"""EVS in Triton: the published masks, exact numbers to the last index, the rest within rounding."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from flashprune.triton_kernels import configs
from flashprune.triton_kernels.evs import evs_select

import flashprune as fp
from inputs import signs
from videos import ADVERSARIAL, DTYPES, check, check_form, golden, load, still, walk

BLOCK = configs.choose("frames", "fp32", "consumer")["BLOCK_D"]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def select(features: torch.Tensor, thw: tuple[int, int, int], q: float, device: torch.device, sort: bool = True):
    k = fp.budget(len(features), 1.0 - q, rule="evs", tokens_per_frame=len(features) // thw[0])
    return evs_select(features.to(device), thw[0], k, sort).cpu()


@golden("evs")
def test_the_mask_is_the_published_one(case: dict, device: torch.device) -> None:
    features, mask, settings = load(case)
    picks = select(features, settings["thw"], settings["q"], device)
    assert torch.equal(fp.indices_to_mask(picks, len(features)), mask)


@every_dtype
@pytest.mark.parametrize("thw", [(1, 3, 3), (2, 5, 7), (12, 1, 1), (7, 3, 4)])
def test_exact_cosines_to_the_last_index(thw: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> None:
    features = signs(thw[0] * thw[1] * thw[2], 16, seed=thw[0])
    for q in (0.0, 0.4, 0.75, 1.0):
        for sort in (True, False):
            expected = fp.reference.evs_select(features.double(), thw, 1, q=q, sort=sort)
            assert torch.equal(select(features.to(dtype), thw, q, device, sort), expected)


@every_dtype
@pytest.mark.parametrize("d", [1, 33, BLOCK, 2 * BLOCK + 5])
def test_rounding_alone_may_differ(d: int, dtype: torch.dtype, device: torch.device) -> None:
    for make in (walk, still):
        features = make((5, 3, 5), d).to(dtype)
        for sort in (True, False):
            check(
                "evs",
                features,
                select(features, (5, 3, 5), 0.4, device, sort),
                thw=(5, 3, 5),
                merge=1,
                q=0.4,
                sort=sort,
            )


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_adversarial_videos(name: str, device: torch.device) -> None:
    for thw in ((1, 2, 3), (4, 3, 3), (9, 1, 1)):
        features = walk(thw)
        ADVERSARIAL[name](features)
        for q in (0.0, 0.6, 1.0):
            picks = select(features, thw, q, device)
            check_form("evs", features, picks, thw, q)
            check("evs", features, picks, thw=thw, merge=1, q=q)


@every_dtype
def test_strides_do_not_matter(dtype: torch.dtype, device: torch.device) -> None:
    wide = walk((4, 3, 4), 70).to(device, dtype)
    for features in (wide[:, 3:60], wide[:, ::2], wide.T.contiguous().T, wide[::2], wide[:, :1]):
        assert torch.equal(evs_select(features, 2, 15, True), evs_select(features.clone(), 2, 15, True))
