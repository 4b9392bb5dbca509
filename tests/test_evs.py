import pytest
import torch
from torch import Tensor

import flashprune as fp
from inputs import signs
from videos import ADVERSARIAL, DTYPES, SHAPES, SHARES, check, check_form, golden, load, still, walk


@golden("evs")
def test_the_mask_is_the_published_one(case: dict, backend: str) -> None:
    features, mask, settings = load(case)
    picks = fp.evs_select(features, **settings, backend=backend)
    assert torch.equal(fp.indices_to_mask(picks, len(features)), mask)


def test_by_hand(backend: str) -> None:
    """Frame 1: place 0 turns by 90 degrees, place 1 stays; frame 2: place 0 stays, place 1 turns right round."""
    features = torch.tensor([[1.0, 0], [0, 1], [0, 2], [0, 3], [0, 1], [0, -1]])
    for q, order in ((0.0, [0, 1, 5, 2, 3, 4]), (0.5, [0, 1, 5]), (0.9, [0, 1]), (1.0, [0, 1])):
        picks = fp.evs_select(features, (3, 1, 2), 1, q=q, sort=False, backend=backend)
        assert picks.tolist() == order
        assert fp.evs_select(features, (3, 1, 2), 1, q=q, backend=backend).tolist() == sorted(order)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("thw", [*SHAPES, (5, 13, 9), (40, 3, 3)])
@pytest.mark.parametrize("q", SHARES)
def test_exact_cosines_to_the_last_index(q: float, thw: tuple[int, int, int], dtype: torch.dtype, backend: str) -> None:
    """±1 in 16 channels: every cosine is exact and most are tied."""
    features = signs(thw[0] * thw[1] * thw[2], 16, seed=thw[0])
    picks = fp.evs_select(features.to(dtype), thw, 1, q=q, sort=False, backend=backend)
    assert torch.equal(picks, fp.reference.evs_select(features.double(), thw, 1, q=q, sort=False))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("make", [walk, still])
@pytest.mark.parametrize("d", [1, 17, 300])
def test_rounding_alone_may_differ(make, d: int, dtype: torch.dtype, backend: str) -> None:
    for thw in SHAPES:
        for q in SHARES:
            features = make(thw, d).to(dtype)
            for sort in (True, False):
                picks = fp.evs_select(features, thw, 1, q=q, sort=sort, backend=backend)
                check("evs", features, picks, thw=thw, merge=1, q=q, sort=sort)


@pytest.mark.parametrize("name", ADVERSARIAL)
@pytest.mark.parametrize("thw", SHAPES)
def test_adversarial_videos(name: str, thw: tuple[int, int, int], backend: str) -> None:
    features = walk(thw)
    ADVERSARIAL[name](features)
    for q in SHARES:
        picks = fp.evs_select(features, thw, 1, q=q, backend=backend)
        check_form("evs", features, picks, thw, q)
        check("evs", features, picks, thw=thw, merge=1, q=q)
        assert torch.equal(picks, fp.evs_select(features, thw, 1, q=q, backend=backend))


def test_a_row_without_direction_differs_from_any(backend: str) -> None:
    """Its cosine is 0, so it comes after a row that turned round and before one that stayed."""
    features = torch.ones(6, 4)
    features[3], features[4] = 0, -1
    picks = fp.evs_select(features, (2, 1, 3), 1, q=0.0, sort=False, backend=backend)
    assert picks.tolist() == [0, 1, 2, 4, 3, 5]


def test_merge_and_the_forms_of_thw(backend: str) -> None:
    features = walk((3, 4, 5))
    expected = fp.evs_select(features, (3, 4, 5), 1, q=0.5, backend=backend)
    for thw, merge in (((3, 8, 10), 2), ([3, 9, 11], 2), (torch.tensor([3, 12, 15]), 3), (torch.tensor([3, 4, 5]), 1)):
        assert torch.equal(fp.evs_select(features, thw, merge, q=0.5, backend=backend), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_do_not_matter(dtype: torch.dtype, backend: str) -> None:
    wide = walk((4, 5, 6), 90).to(dtype)
    for features in (wide[:, 3:60], wide[:, ::2], wide.T.contiguous().T, wide[:60][::2], wide[:, :1]):
        thw = (len(features) // 30, 5, 6)
        picks = fp.evs_select(features, thw, 1, q=0.6, backend=backend)
        assert torch.equal(picks, fp.evs_select(features.contiguous(), thw, 1, q=0.6, backend=backend))


@pytest.mark.usefixtures("native")
def test_any_number_of_threads() -> None:
    features, before = walk((30, 9, 9), 256), torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(fp.evs_select(features, (30, 9, 9), 1, q=0.5, sort=False, backend="cpu"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(picks, found[0]) for picks in found)


def test_float64_is_for_the_reference() -> None:
    features = walk((3, 4, 5)).double()
    with pytest.raises(ValueError, match="got float64"):
        fp.evs_select(features, (3, 4, 5), 1, q=0.5, backend="cpu")
    assert len(fp.evs_select(features, (3, 4, 5), 1, q=0.5, backend="reference")) == 30


ERRORS = [
    ({"features": torch.ones(40, 8)}, ValueError, r"thw=\(4, 6, 8\) with merge=2 holds 48 tokens, features has 40"),
    ({"merge": 1}, ValueError, r"thw=\(4, 6, 8\) holds 192 tokens, features has 48"),
    ({"merge": 9, "features": torch.ones(0, 8)}, ValueError, r"thw=\(4, 6, 8\) with merge=9 leaves no token"),
    ({"features": torch.ones(2, 48, 8)}, ValueError, r"features must be \[N, D\] of one video, got \[2, 48, 8\]"),
    ({"features": torch.ones(48, 8, dtype=torch.int32)}, TypeError, "features must be float32"),
    ({"features": torch.ones(48, 0)}, ValueError, "features must have D >= 1"),
    ({"features": torch.ones(48, 8, requires_grad=True)}, ValueError, "features requires grad"),
    ({"thw": (4, 6)}, TypeError, r"thw must be 3 ints or an integer tensor \[3\], got \(4, 6\)"),
    ({"thw": 192}, TypeError, "thw must be 3 ints or an integer tensor"),
    ({"thw": (4, 6.0, 8)}, TypeError, r"thw\[1\] must be a host int, got float 6.0"),
    ({"thw": (0, 6, 8)}, ValueError, r"thw\[0\]=0 must be at least 1"),
    ({"thw": torch.tensor([4.0, 6, 8])}, TypeError, r"thw must be .*, got torch.float32 \[3\]"),
    ({"thw": torch.tensor([[4, 6, 8]])}, TypeError, r"thw must be .*, got torch.int64 \[1, 3\]"),
    ({"thw": torch.empty(3, dtype=torch.int64, device="meta")}, ValueError, "thw is read by the host .*, got meta"),
    ({"merge": 0}, ValueError, "merge=0 must be at least 1"),
    ({"q": 1.5}, ValueError, "q=1.5 must be between 0 and 1"),
    ({"q": "half"}, TypeError, "q must be a host number"),
    ({"sort": 1}, TypeError, "sort must be a bool"),
    ({"backend": "fast"}, ValueError, "backend must be one of"),
]


@pytest.mark.parametrize("function", [fp.evs_select, fp.vidcom2_select, fp.reference.evs_select])
@pytest.mark.parametrize(("change", "error", "message"), ERRORS)
def test_errors_name_the_argument(change: dict, error: type, message: str, function) -> None:
    good = {"features": torch.ones(48, 8), "thw": (4, 6, 8), "merge": 2, "q": 0.5}
    function(**good)
    with pytest.raises(error, match=message):
        function(**good | change)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("op", ["evs_select", "vidcom2_select"])
def test_the_operator_checks_by_itself(op: str) -> None:
    keep = (0.5,) if op == "vidcom2_select" else ()
    select = getattr(torch.ops.flashprune, op)
    for features, frames, k, message in (
        (torch.ones(12, 4), 5, 3, "frames: expected a divisor of N=12, got 5"),
        (torch.ones(12, 4), 0, 3, "frames: expected a divisor of N=12, got 0"),
        (torch.ones(0, 4), 1, 0, "frames: expected a divisor of N=0, got 1"),
        (torch.ones(12, 4), 3, 13, "k=13 exceeds N=12"),
        (torch.ones(3, 12, 4), 3, 2, r"features: expected \[N, D\] of one video"),
        (torch.ones(12, 4).double(), 3, 2, "features: expected float32, float16 or bfloat16"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=message):
            select(features, frames, *keep, k, True)


@pytest.mark.usefixtures("native")
def test_opcheck_and_one_graph() -> None:
    features = walk((5, 4, 6))
    for sort in (True, False):
        torch.library.opcheck(torch.ops.flashprune.evs_select, (features, 5, 60, sort))
        torch.library.opcheck(torch.ops.flashprune.vidcom2_select, (features, 5, 0.5, 60, sort))

    def prune(features: Tensor) -> tuple[Tensor, Tensor]:
        evs = fp.evs_select(features * 2, (5, 8, 12), 2, q=0.5)
        vidcom2 = fp.vidcom2_select(features * 2, (5, 8, 12), 2, q=0.25)
        return features[evs], fp.indices_to_mask(vidcom2, len(features))

    torch._dynamo.reset()
    kept, mask = torch.compile(prune, fullgraph=True, backend="aot_eager")(features)
    assert torch.equal(kept, prune(features)[0]) and torch.equal(mask, prune(features)[1])
    assert (len(kept), int(mask.sum())) == (60, 90)


def test_a_replay_finds_what_is_wrong() -> None:
    features, thw = walk((6, 4, 5), 64), (6, 4, 5)
    picks = fp.evs_select(features, thw, 1, q=0.5, sort=False)
    rest = (~fp.indices_to_mask(picks, len(features))).nonzero().flatten()
    best = {"missed": picks.clone(), "swapped": picks.clone(), "first": picks.clone()}
    best["missed"][40] = rest[0]
    best["swapped"][[25, 59]] = picks[[59, 25]]
    best["first"][3] = rest[0]
    for name, wrong in best.items():
        report = fp.testing.check_selection("evs", features, picks=wrong, thw=thw, merge=1, q=0.5)
        assert not report.ok and report.largest_regret > report.bound, name
        as_set = fp.testing.check_selection(
            "evs", features, picks=wrong.sort().values, thw=thw, merge=1, q=0.5, sort=True
        )
        assert as_set.ok == (name == "swapped")
    with pytest.raises(AssertionError, match=r"picks must be \[60\], got \[59\]"):
        check("evs", features, picks[:59], thw=thw, merge=1, q=0.5)
    with pytest.raises(ValueError, match="evs takes thw, merge and q, not k"):
        fp.testing.check_selection("evs", features, picks=picks, k=60, thw=thw, merge=1, q=0.5)
