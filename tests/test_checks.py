"""Every wrong argument gets an error that names it, what was expected and what came."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import flashprune as fp

X = torch.ones(12, 4)
W = torch.ones(12)
X3, I3 = torch.ones(2, 6, 4), torch.ones(2, 6)
CU = torch.tensor([0, 5, 12], dtype=torch.int32)
CALLS = {
    "topk": lambda x, i, k, **more: fp.topk_select(i, k, **more),
    "mmr": fp.mmr_select,
    "mis": fp.mis_select,
    "maxmin": lambda x, i, k, **more: fp.maxmin_select(x, k, **more),
    "dpp": fp.dpp_select,
}
every_selector = pytest.mark.parametrize("method", CALLS)
with_features = pytest.mark.parametrize("method", ["mmr", "mis", "maxmin", "dpp"])
with_scores = pytest.mark.parametrize("method", ["mmr", "mis", "dpp"])


def refused(
    error: type[Exception], message: str, call: Callable[..., object], *args: object, **settings: object
) -> None:
    """By the public function and by the reference, with this very message."""
    for backend in ("auto", "reference"):
        with pytest.raises(error) as caught:
            call(*args, backend=backend, **settings)
        assert str(caught.value) == message


def second(method: str) -> str:
    return "relevance" if method == "dpp" else "importance"


@with_features
@pytest.mark.parametrize(
    ("features", "error", "message"),
    [
        ([[1.0]], TypeError, "features must be a torch.Tensor, got list"),
        (X.int(), TypeError, "features must be float32, float16, bfloat16 or float64, got int32"),
        (
            X.to(torch.float8_e4m3fn),
            TypeError,
            "features must be float32, float16, bfloat16 or float64, got float8_e4m3fn",
        ),
        (X[0], ValueError, "features must be [N, D] or [B, N, D], got [4]"),
        (X[None, None], ValueError, "features must be [N, D] or [B, N, D], got [1, 1, 12, 4]"),
        (X[:, :0], ValueError, "features must have D >= 1, got [12, 0]"),
    ],
)
def test_features(method: str, features: object, error: type[Exception], message: str) -> None:
    refused(error, message, CALLS[method], features, W, 2)


@pytest.mark.parametrize(
    ("scores", "error", "message"),
    [
        ((1.0, 2.0), TypeError, "scores must be a torch.Tensor, got tuple"),
        (W.long(), TypeError, "scores must be float32, float16, bfloat16 or float64, got int64"),
        (W.bool(), TypeError, "scores must be float32, float16, bfloat16 or float64, got bool"),
        (torch.tensor(1.0), ValueError, "scores must be [N] or [B, N], got []"),
        (X3, ValueError, "scores must be [N] or [B, N], got [2, 6, 4]"),
    ],
)
def test_scores(scores: object, error: type[Exception], message: str) -> None:
    refused(error, message, fp.topk_select, scores, 2)


@with_scores
def test_importance(method: str) -> None:
    call, name = CALLS[method], second(method)
    refused(TypeError, f"{name} must be a torch.Tensor, got float", call, X, 0.5, 2)
    refused(TypeError, f"{name} must be float32, float16, bfloat16 or float64, got int64", call, X, W.long(), 2)
    expected = "one value for each row of features"
    refused(ValueError, f"{name} must be [12], {expected} [12, 4], got [11]", call, X, W[1:], 2)
    refused(ValueError, f"{name} must be [2, 6], {expected} [2, 6, 4], got [6]", call, X3, W[:6], 2)
    refused(ValueError, f"{name} must be [12], {expected} [12, 4], got [12, 1]", call, X, W[:, None], 2)
    refused(ValueError, f"{name} must be on the device of features, cpu, got meta", call, X, W.to("meta"), 2)


@every_selector
def test_k(method: str) -> None:
    call = CALLS[method]
    refused(ValueError, "k=13 exceeds N=12", call, X, W, 13)
    refused(ValueError, "k=7 exceeds N=6", call, X3, I3, 7)
    refused(ValueError, "k=-1 must be at least 0", call, X, W, -1)
    refused(TypeError, "k must be a host int, got float 0.5", call, X, W, 0.5)
    refused(TypeError, "k must be a host int, got bool True", call, X, W, True)
    refused(TypeError, "k must be a host int, got Tensor", call, X, W, torch.tensor(3))
    refused(TypeError, "k must be a host int, got NoneType None", call, X, W, None)
    refused(TypeError, "k must be a host int, got list", call, X3, I3, [2, 2])
    refused(ValueError, "k=8 exceeds N=7 in segment 1", call, X, W, [5, 8], cu_seqlens=CU)
    refused(ValueError, "k=6 exceeds N=5 in segment 0", call, X, W, 6, cu_seqlens=CU)
    refused(ValueError, "k[1]=-2 must be at least 0", call, X, W, [1, -2], cu_seqlens=CU)
    refused(TypeError, "k[0] must be a host int, got float 1.0", call, X, W, [1.0, 2], cu_seqlens=CU)
    expected = "k must be an int or one int a segment, expected 2 values, got 3"
    refused(ValueError, expected, call, X, W, [1, 1, 1], cu_seqlens=CU)


@every_selector
def test_cu_seqlens(method: str) -> None:
    def bad(error: type[Exception], message: str, cu_seqlens: object) -> None:
        refused(error, f"cu_seqlens must {message}", CALLS[method], X, W, 1, cu_seqlens=cu_seqlens)

    def bounds(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32)

    bad(TypeError, "be an int32 tensor [B+1], got list", [0, 5, 12])
    bad(TypeError, "be int32, got int64", CU.long())
    bad(TypeError, "be int32, got float32", CU.float())
    bad(ValueError, "be [B+1], got [1, 3]", CU[None])
    bad(ValueError, "be [B+1], got [0]", CU[:0])
    bad(ValueError, "start at 0, got 1", bounds(1, 5, 12))
    bad(ValueError, "not fall, got 8 then 5 at segment 1", bounds(0, 8, 5, 12))
    bad(ValueError, "end at T=12, got 11", bounds(0, 5, 11))
    bad(ValueError, "end at T=12, got 13", bounds(0, 5, 13))
    name = "scores" if method == "topk" else "features"
    bad(ValueError, f"be on the device of {name}, cpu, got meta", CU.to("meta"))
    message = f"{name} must be packed along one dimension when cu_seqlens is given, got tokens [2, 6]"
    refused(ValueError, message, CALLS[method], X3, I3, 1, cu_seqlens=CU)


@every_selector
def test_sort_and_backend(method: str) -> None:
    refused(TypeError, "sort must be a bool, got int 1", CALLS[method], X, W, 2, sort=1)
    with pytest.raises(
        ValueError, match="backend must be one of 'auto', 'cuda', 'triton', 'cpu', 'reference', got 'gpu'"
    ):
        CALLS[method](X, W, 2, backend="gpu")
    with pytest.raises(ValueError, match="backend must be one of 'auto', 'reference', got 'cpu'"):
        fp.reference.topk_select(W, 2, backend="cpu")


@every_selector
def test_inputs_that_require_grad(method: str) -> None:
    features, scores = X.clone().requires_grad_(), W.clone().requires_grad_()
    message = "{} requires grad, and a selection has no gradient: call it under torch.no_grad()"
    name = "scores" if method == "topk" else "features"
    refused(ValueError, message.format(name), CALLS[method], features, scores, 2)
    if method in ("mmr", "mis", "dpp"):
        refused(ValueError, message.format(second(method)), CALLS[method], X, scores, 2)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(CALLS[method](features, scores, 2), CALLS[method](X, W, 2))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"lam": 1.5}, ValueError, "lam=1.5 must be between 0 and 1"),
        ({"lam": -0.1}, ValueError, "lam=-0.1 must be between 0 and 1"),
        ({"lam": float("nan")}, ValueError, "lam=nan must be finite"),
        ({"lam": "0.5"}, TypeError, "lam must be a host number, got str '0.5'"),
        ({"lam": torch.tensor(0.5)}, TypeError, "lam must be a host number, got Tensor"),
        ({"per_round": 0}, ValueError, "per_round=0 must be at least 1"),
        ({"per_round": 2.0}, TypeError, "per_round must be a host int, got float 2.0"),
    ],
)
def test_mmr_settings(settings: dict, error: type[Exception], message: str) -> None:
    refused(error, message, fp.mmr_select, X, W, 2, **settings)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"alpha": 1.01}, ValueError, "alpha=1.01 must be between 0 and 1"),
        ({"alpha": float("nan")}, ValueError, "alpha=nan must be finite"),
        ({"threshold": float("nan")}, ValueError, "threshold=nan must be finite"),
        ({"threshold": float("inf")}, ValueError, "threshold=inf must be finite"),
        ({"threshold": None}, TypeError, "threshold must be a host number, got NoneType None"),
        ({"similarity": "dot"}, ValueError, "similarity must be one of 'cosine', 'half_cosine', got 'dot'"),
        (
            {"proximity": "euclid"},
            ValueError,
            "proximity must be one of 'chebyshev', 'gaussian', 'linear', got 'euclid'",
        ),
        ({"radius": -1}, ValueError, "radius=-1 must be at least 0"),
        ({"radius": 1.5}, TypeError, "radius must be a host int, got float 1.5"),
        ({"sigma": 0}, ValueError, "sigma=0 must be between 1e-06 and 1e+06"),
        ({"sigma": float("inf")}, ValueError, "sigma=inf must be finite"),
        ({"temporal_radius": -2}, ValueError, "temporal_radius=-2 must be at least 0"),
        ({"pivots": 3}, ValueError, "pivots=3 exceeds k=2"),
        ({"pivots": -1}, ValueError, "pivots=-1 must be at least 0"),
        ({"pivots": 0.7}, TypeError, "pivots must be a host int, got float 0.7"),
        (
            {"pivots": [1, 1]},
            ValueError,
            "pivots must be an int or one int a segment, expected 1 values, got 2",
        ),
        ({"pivots": [1, 3], "cu_seqlens": CU}, ValueError, "pivots=3 exceeds k=2 in segment 1"),
        ({"pivots_suppress": 1}, TypeError, "pivots_suppress must be a bool, got int 1"),
    ],
)
def test_mis_settings(settings: dict, error: type[Exception], message: str) -> None:
    refused(error, message, fp.mis_select, X, W, 2, **settings)


PLACES = torch.zeros(12, 3, dtype=torch.int32)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({}, ValueError, "alpha=0.5 weighs proximity, which needs grid or positions"),
        ({"grid": (3, 4), "positions": PLACES}, ValueError, "grid and positions exclude each other, got both"),
        ({"grid": (3, 5)}, ValueError, "grid (1, 3, 5) holds 15 tokens, expected N=12"),
        ({"grid": (2, 2, 2)}, ValueError, "grid (2, 2, 2) holds 8 tokens, expected N=12"),
        ({"grid": (12,)}, ValueError, "grid must be (h, w) or (t, h, w), got (12,)"),
        ({"grid": (1, 1, 3, 4)}, ValueError, "grid must be (h, w) or (t, h, w), got (1, 1, 3, 4)"),
        ({"grid": 12}, TypeError, "grid must be (h, w), (t, h, w) or a list of these, got 12"),
        ({"grid": ()}, TypeError, "grid must be (h, w), (t, h, w) or a list of these, got ()"),
        ({"grid": (0, 12)}, ValueError, "grid[0]=0 must be at least 1"),
        ({"grid": (3, 4.0)}, TypeError, "grid[1] must be a host int, got float 4.0"),
        ({"grid": [(3, 4), (3, 4)]}, ValueError, "grid must be one grid or one a segment, expected 1, got 2"),
        ({"grid": [(5, 1), 7], "cu_seqlens": CU}, ValueError, "grid[1] must be (h, w) or (t, h, w), got 7"),
        (
            {"grid": [(5, 1), (2, 3)], "cu_seqlens": CU},
            ValueError,
            "grid (1, 2, 3) holds 6 tokens, expected N=7 in segment 1",
        ),
        (
            {"grid": (2, 3), "cu_seqlens": CU},
            ValueError,
            "grid (1, 2, 3) holds 6 tokens, expected N=5 in segment 0",
        ),
        ({"positions": [[0, 0, 0]] * 12}, TypeError, "positions must be an int32 tensor, got list"),
        ({"positions": PLACES.long()}, TypeError, "positions must be int32, got int64"),
        (
            {"positions": PLACES[:, :2]},
            ValueError,
            "positions must be [12, 3], a (t, y, x) for each token, got [12, 2]",
        ),
        (
            {"positions": PLACES[1:]},
            ValueError,
            "positions must be [12, 3], a (t, y, x) for each token, got [11, 3]",
        ),
        ({"positions": PLACES.to("meta")}, ValueError, "positions must be on the device of features, cpu, got meta"),
    ],
)
def test_mis_places(settings: dict, error: type[Exception], message: str) -> None:
    refused(error, message, fp.mis_select, X, W, 2, alpha=0.5, **settings)


def test_a_batch_with_one_grid_too_many() -> None:
    message = "grid must be one grid or one a segment, expected 2, got 3"
    refused(ValueError, message, fp.mis_select, X3, I3, 2, grid=[(2, 3)] * 3, alpha=0.5)


@pytest.mark.parametrize("method", CALLS)
@pytest.mark.parametrize(
    ("k", "cu_seqlens", "message"),
    [
        ([13], None, "k=13 exceeds N=12"),
        ([6, 0], CU, "k=6 exceeds N=5 in segment 0"),
        ([1], CU, "k"),
        ([1, 1], CU + 1, "cu_seqlens"),
        ([1, 1, 1], torch.tensor([0, 8, 5, 12], dtype=torch.int32), "cu_seqlens"),
        ([1, 1], torch.tensor([0, 5, 13], dtype=torch.int32), "cu_seqlens"),
        ([1, 1], CU.long(), "cu_seqlens"),
    ],
)
def test_operators_check_values_too(
    method: str, k: list[int], cu_seqlens: torch.Tensor | None, message: str, native: None
) -> None:
    """Under torch.compile the operators are the only ones to see the values."""
    ops = torch.ops.flashprune
    calls = {
        "topk": lambda: ops.topk_select(W, k, cu_seqlens, True),
        "mmr": lambda: ops.mmr_select(X, W, k, cu_seqlens, 0.5, 1, True),
        "mis": lambda: ops.mis_select(
            X, W, k, None, cu_seqlens, 1.0, 0.8, "cosine", "chebyshev", 1, 1.0, 0, [0] * len(k), False, True
        ),
        "maxmin": lambda: ops.maxmin_select(X, k, cu_seqlens, True),
        "dpp": lambda: ops.dpp_select(X, W, k, cu_seqlens, True),
    }
    with pytest.raises((ValueError, RuntimeError)) as caught:
        calls[method]()
    assert message in str(caught.value)
