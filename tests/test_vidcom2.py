import pytest
import torch

import flashprune as fp
from flashprune.reference import video
from videos import ADVERSARIAL, DTYPES, SHAPES, SHARES, check, check_form, golden, load, still, walk


@golden("vidcom2")
def test_the_mask_is_the_published_one(case: dict, backend: str) -> None:
    features, mask, settings = load(case)
    picks = fp.vidcom2_select(features, **settings, backend=backend)
    assert torch.equal(fp.indices_to_mask(picks, len(features)), mask)


@golden("vidcom2")
def test_the_order_is_the_definitions(case: dict, backend: str) -> None:
    features, _, settings = load(case)
    picks = fp.vidcom2_select(features, **settings, sort=False, backend=backend)
    assert torch.equal(picks, fp.reference.vidcom2_select(features.double(), **settings, sort=False))


def test_by_hand(backend: str) -> None:
    """Channels 2 and 3 vary most and are left out; token 5 alone points elsewhere in the others, token 2 a bit."""
    features = torch.tensor([[1.0, 0, 9, -9]]).repeat(6, 1)
    features[::2, 2:] *= -1
    features[5, :2] = torch.tensor([0.0, 1.0])
    features[2, :2] = torch.tensor([0.9, -0.1])
    assert fp.vidcom2_select(features, (1, 2, 3), 1, q=0.5, sort=False, backend=backend).tolist() == [5, 2, 0]


def test_a_frame_that_stands_out_keeps_more(backend: str) -> None:
    features = still((6, 5, 5), 64)
    features[50:75] = torch.randn(25, 64, generator=torch.Generator().manual_seed(1))  # frame 2
    picks = fp.vidcom2_select(features, (6, 5, 5), 1, q=0.8, backend=backend)
    kept = (picks // 25).bincount(minlength=6)
    assert kept[2] == kept.max() > 2 * kept[0] and kept.min() >= 1


def test_every_frame_keeps_a_token(backend: str) -> None:
    for q in (0.9, 0.99, 1.0):
        picks = fp.vidcom2_select(walk((9, 3, 3)), (9, 3, 3), 1, q=q, backend=backend)
        assert len(picks) == 9 and (q < 1 or (picks // 9).tolist() == list(range(9)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("make", [walk, still])
@pytest.mark.parametrize("d", [1, 3, 17, 300])
def test_rounding_alone_may_differ(make, d: int, dtype: torch.dtype, backend: str) -> None:
    for thw in (*SHAPES, (40, 3, 3)):
        for q in SHARES:
            features = make(thw, d).to(dtype)
            picks = fp.vidcom2_select(features, thw, 1, q=q, backend=backend)
            check("vidcom2", features, picks, thw=thw, merge=1, q=q)
            order = fp.vidcom2_select(features, thw, 1, q=q, sort=False, backend=backend)
            assert torch.equal(order.sort().values, picks)


@pytest.mark.parametrize("name", ADVERSARIAL)
@pytest.mark.parametrize("thw", SHAPES)
def test_adversarial_videos(name: str, thw: tuple[int, int, int], backend: str) -> None:
    features = walk(thw)
    ADVERSARIAL[name](features)
    for q in SHARES:
        picks = fp.vidcom2_select(features, thw, 1, q=q, backend=backend)
        check_form("vidcom2", features, picks, thw, q)
        check("vidcom2", features, picks, thw=thw, merge=1, q=q)
        assert torch.equal(picks, fp.vidcom2_select(features, thw, 1, q=q, backend=backend))


def test_equal_tokens_go_by_index(backend: str) -> None:
    features = torch.ones(24, 8)
    for q, order in ((0.5, [0, 1, 2, 6, 7, 8, 12, 13, 14, 18, 19, 20]), (0.9, [0, 6, 12, 18])):
        assert fp.vidcom2_select(features, (4, 2, 3), 1, q=q, sort=False, backend=backend).tolist() == order


def test_a_nan_in_a_channel_that_varies_is_not_seen(backend: str) -> None:
    """A NaN or an overflow makes its channel the last; the half without keeps its meaning."""
    features, thw = walk((4, 3, 4), 8), (4, 3, 4)
    features[:, 4:] *= 100
    expected = fp.vidcom2_select(features, thw, 1, q=0.5, backend=backend)
    features[3, 5], features[7, 6], features[11, 7] = torch.nan, torch.inf, 3e38
    assert torch.equal(fp.vidcom2_select(features, thw, 1, q=0.5, backend=backend), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_do_not_matter(dtype: torch.dtype, backend: str) -> None:
    wide = walk((4, 5, 6), 90).to(dtype)
    for features in (wide[:, 3:60], wide[:, ::2], wide.T.contiguous().T, wide[:60][::2], wide[:, :1]):
        thw = (len(features) // 30, 5, 6)
        picks = fp.vidcom2_select(features, thw, 1, q=0.6, backend=backend)
        assert torch.equal(picks, fp.vidcom2_select(features.contiguous(), thw, 1, q=0.6, backend=backend))


@pytest.mark.usefixtures("native")
def test_any_number_of_threads() -> None:
    features, before = walk((30, 9, 9), 256), torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(fp.vidcom2_select(features, (30, 9, 9), 1, q=0.5, sort=False, backend="cpu"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(picks, found[0]) for picks in found)


def test_budgets_of_frames() -> None:
    """Equal frames share evenly, halves rounded to even; one that stands out takes what it can hold."""
    assert video.frame_budgets(torch.full((4,), 3.0), 0.5, 5).tolist() == [2] * 4
    assert video.frame_budgets(torch.full((4,), 3.0), 0.5, 7).tolist() == [4] * 4
    assert video.frame_budgets(torch.tensor([3.0, 1.0]), 0.5, 100).tolist() == [25, 75]
    assert video.frame_budgets(torch.tensor([3.0, 1.0]), 0.9, 100).tolist() == [45, 100]
    assert video.frame_budgets(torch.tensor([3.0, 1.0]), 0.0, 100).tolist() == [1, 1]


def test_a_replay_finds_what_is_wrong() -> None:
    features, thw = walk((6, 4, 5), 64), (6, 4, 5)
    picks = fp.vidcom2_select(features, thw, 1, q=0.5)
    mask = fp.indices_to_mask(picks, len(features))
    order = fp.vidcom2_select(features, thw, 1, q=0.0, sort=False)
    kept, left = ([i for i in order.tolist() if mask[i] == side] for side in (True, False))
    for i, j in ((kept[0], left[-1]), (kept[5], left[-5]), (kept[0], left[0])):
        wrong = mask.clone()
        wrong[i], wrong[j] = False, True
        report = fp.testing.check_selection(
            "vidcom2", features, picks=wrong.nonzero().flatten(), thw=thw, merge=1, q=0.5, sort=True
        )
        assert not report.ok and report.largest_regret > report.bound
    # As many from every frame, the least similar ones, is not the distribution that the method asks for.
    even = torch.cat([order[order // 20 == frame][:10] for frame in range(6)]).sort().values
    with pytest.raises(AssertionError, match="vidcom2"):
        check("vidcom2", features, even, thw=thw, merge=1, q=0.5)
    check("vidcom2", features, picks, thw=thw, merge=1, q=0.5)
