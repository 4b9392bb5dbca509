"""VidCom2 in Triton: the published masks, each stage against the definition, the whole within rounding."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton")

from flashprune.triton_kernels import configs, vidcom2

import flashprune as fp
from flashprune.reference import video
from videos import ADVERSARIAL, DTYPES, check, check_form, golden, load, still, walk

BLOCK = configs.choose("frames", "fp32", "consumer")["BLOCK_D"]
LINE = configs.choose("video", "fp32", "consumer")
RANKS = configs.choose("ranks", "fp32", "consumer")
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def select(features: torch.Tensor, thw: tuple[int, int, int], q: float, device: torch.device, sort: bool = True):
    k = fp.budget(len(features), 1.0 - q, rule="vidcom2", tokens_per_frame=len(features) // thw[0])
    return vidcom2.vidcom2_select(features.to(device), thw[0], 1.0 - q, k, sort).cpu()


@golden("vidcom2")
def test_the_mask_is_the_published_one(case: dict, device: torch.device) -> None:
    features, mask, settings = load(case)
    picks = select(features, settings["thw"], settings["q"], device)
    assert torch.equal(fp.indices_to_mask(picks, len(features)), mask)


@golden("vidcom2")
def test_the_order_is_the_definitions(case: dict, device: torch.device) -> None:
    features, _, settings = load(case)
    expected = fp.reference.vidcom2_select(features.double(), **settings, sort=False)
    assert torch.equal(select(features, settings["thw"], settings["q"], device, sort=False), expected)


@every_dtype
@pytest.mark.parametrize(("n", "d"), [(1, 5), (7, 1), (33, 70), (200, 19)])
def test_the_channels_of_lowest_variance(n: int, d: int, dtype: torch.dtype, device: torch.device) -> None:
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(n)) * torch.linspace(1, 9, d).flip(0) + 3
    x = x.to(dtype)
    x[:, ::5] = 0.1  # never changes
    expected = video.steady_channels(x.double()).sort().values
    assert torch.equal(vidcom2.steady_channels(x.to(device)).cpu(), expected)


def test_a_channel_with_a_nan_comes_last(device: torch.device) -> None:
    x = walk((3, 2, 2), 6)
    x[:, 3:] *= 100
    x[2, 3], x[1, 4], x[0, 5] = math.nan, math.inf, 3e38
    assert vidcom2.steady_channels(x.to(device)).tolist() == [0, 1, 2]
    x[3, 1] = math.nan  # of the channels that come last it is the first
    assert vidcom2.steady_channels(x.to(device)).tolist() == [0, 1, 2]
    x[:, 2] *= math.inf
    assert vidcom2.steady_channels(x.to(device)).tolist() == [0, 1, 2]


@every_dtype
@pytest.mark.parametrize("d", [1, 33, BLOCK, BLOCK + 5])
def test_similarities(d: int, dtype: torch.dtype, device: torch.device) -> None:
    """Over some channels, with rows that have no norm."""
    x = walk((3, 5, 7), 2 * d).to(dtype)
    x[4], x[9, 1::2], x[11, ::2] = 0, math.inf, math.nan
    channels = torch.arange(1, 2 * d, 2)
    got = vidcom2.similarities(x.to(device), channels.to(device), 3)
    expected = video.similarities(x[:, channels].double(), 3)
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine.cpu().double(), theirs.flatten(), rtol=0, atol=5e-6)


@pytest.mark.parametrize("frames", [1, 2, 7, LINE["BLOCK"], LINE["BLOCK"] + 9])
def test_frame_budgets(frames: int, device: torch.device) -> None:
    means = 3 + 0.02 * torch.randn(frames, generator=torch.Generator().manual_seed(frames))
    for places, keep in ((1, 0.7), (6, 0.5), (196, 0.1), (64, 1.0), (64, 0.0)):
        budgets = torch.empty(frames, dtype=torch.int32, device=device)
        vidcom2.budgets_kernel[(1,)](means.to(device), budgets, frames, places, keep, **LINE)
        shares = video.frame_shares(means.double(), keep) * places
        clear = (shares - shares.floor() - 0.5).abs() > 1e-3
        assert clear.float().mean() > 0.9
        expected = video.frame_budgets(means.double(), keep, places)
        assert torch.equal(budgets.cpu().long()[clear], expected[clear])


@pytest.mark.parametrize(("places", "expected"), [(5, 2), (6, 3), (7, 4), (1, 1)])
def test_half_a_token_goes_to_the_even_number(places: int, expected: int, device: torch.device) -> None:
    budgets = torch.empty(4, dtype=torch.int32, device=device)
    vidcom2.budgets_kernel[(1,)](torch.full((4,), 3.0, device=device), budgets, 4, places, 0.5, **LINE)
    assert budgets.tolist() == [expected] * 4


@pytest.mark.parametrize("places", [1, 5, RANKS["COLS"] + 3, RANKS["ROWS"] + 70])
def test_ranks(places: int, device: torch.device) -> None:
    """Many ties, both within budgets and beyond."""
    generator = torch.Generator().manual_seed(places)
    similarity = torch.randint(1, 12, (3, places), generator=generator) / 1.7 + 0.01
    budgets = torch.tensor([1, (places + 1) // 2, places], dtype=torch.int32)
    scores = torch.empty(3 * places, device=device)
    grid = (3, -(-places // RANKS["ROWS"]))
    vidcom2.ranks_kernel[grid](similarity.flatten().to(device), budgets.to(device), scores, places, **RANKS)
    expected = video.by_frame(similarity, budgets.long())
    assert torch.equal(fp.reference.topk_select(scores.cpu(), 3 * places, sort=False), expected)


@every_dtype
@pytest.mark.parametrize("d", [1, 18, 300])
def test_rounding_alone_may_differ(d: int, dtype: torch.dtype, device: torch.device) -> None:
    for make in (walk, still):
        for thw in ((5, 3, 5), (1, 4, 4)):
            features = make(thw, d).to(dtype)
            for q in (0.0, 0.6):
                check("vidcom2", features, select(features, thw, q, device), thw=thw, merge=1, q=q)


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_adversarial_videos(name: str, device: torch.device) -> None:
    for thw in ((1, 2, 3), (4, 3, 3), (9, 1, 1)):
        features = walk(thw)
        ADVERSARIAL[name](features)
        for q in (0.0, 0.6, 1.0):
            picks = select(features, thw, q, device)
            check_form("vidcom2", features, picks, thw, q)
            check("vidcom2", features, picks, thw=thw, merge=1, q=q)


def test_equal_tokens_go_by_index(device: torch.device) -> None:
    features = torch.ones(24, 8)
    for q, order in ((0.5, [0, 1, 2, 6, 7, 8, 12, 13, 14, 18, 19, 20]), (0.9, [0, 6, 12, 18])):
        assert select(features, (4, 2, 3), q, device, sort=False).tolist() == order


@every_dtype
def test_strides_do_not_matter(dtype: torch.dtype, device: torch.device) -> None:
    wide = walk((4, 3, 4), 70).to(device, dtype)
    for features in (wide[:, 3:60], wide[:, ::2], wide.T.contiguous().T, wide[::2], wide[:, :1]):
        picks = vidcom2.vidcom2_select(features, 2, 0.5, len(features) // 2, True)
        assert torch.equal(picks, vidcom2.vidcom2_select(features.clone(), 2, 0.5, len(features) // 2, True))
