"""The learned scorer against its quadratic definition, and loading of trained weights."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

import flashprune as fp

D, HIDDEN = 24, 16
KEYS = ("q_proj.weight", "q_proj.bias", "k_proj.weight", "k_proj.bias")


@pytest.fixture
def scorer():
    torch.manual_seed(0)
    return fp.VisionSelector(D, HIDDEN).requires_grad_(False)


def definition(scorer, features):
    """mean over j of q_i·k_j / sqrt(hidden), with all N x N products, in float64."""
    x, scorer = features.double(), scorer.double()
    return (scorer.q_proj(x) @ scorer.k_proj(x).mT / HIDDEN**0.5).mean(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_scores_are_the_definition(scorer, dtype):
    features = torch.randn(50, D).to(dtype)
    actual = scorer(features)
    assert actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = 1e-7 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(actual.double(), definition(scorer, features), rtol=tolerance, atol=tolerance)


def test_batched_and_packed_scores_are_those_of_each_segment(scorer):
    features = torch.randn(60, D)
    rows = features.reshape(3, 20, D)
    torch.testing.assert_close(scorer(rows), torch.stack([scorer(row) for row in rows]))
    bounds = [0, 7, 7, 8, 60]
    packed = scorer(features, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
    parts = [scorer(features[a:b]) for a, b in pairwise(bounds)]
    torch.testing.assert_close(packed, torch.cat(parts))


def test_scores_of_nothing(scorer):
    assert scorer(torch.empty(0, D)).shape == (0,)
    assert scorer(torch.empty(2, 0, D)).shape == (2, 0)
    assert scorer(torch.empty(0, D), cu_seqlens=torch.zeros(3, dtype=torch.int32)).shape == (0,)


def test_no_operation_grows_with_the_square_of_n(scorer):
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            self.elements = max(self.elements, result.numel())
            return result

    features = torch.randn(4096, D)
    with Largest() as seen:
        scorer(features)
    assert seen.elements <= features.numel()


def test_the_scorer_trains():
    scorer = fp.VisionSelector(D, HIDDEN)
    scorer(torch.randn(10, D)).sum().backward()
    assert all(parameter.grad is not None for parameter in scorer.parameters())


def test_compiled_scores_are_the_eager_ones(scorer):
    features, spans = torch.randn(30, D), torch.tensor([0, 10, 30], dtype=torch.int32)
    compiled = torch.compile(lambda x, c: scorer(x, cu_seqlens=c), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(features, spans), scorer(features, cu_seqlens=spans))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda s: s(torch.randn(5, 23)), ValueError, r"features must be \[N, 24\] or \[B, N, 24\], got \[5, 23\]"),
        (lambda s: s(torch.randn(D)), ValueError, r"got \[24\]"),
        (lambda s: s([1.0]), TypeError, "features must be a torch.Tensor"),
        (lambda s: s(torch.ones(5, D).int()), TypeError, "features must be float32"),
        (
            lambda s: s(torch.randn(2, 5, D), cu_seqlens=torch.tensor([0, 5], dtype=torch.int32)),
            ValueError,
            r"features must be packed \[T, D\]",
        ),
        (lambda s: s(torch.randn(5, D), cu_seqlens=torch.tensor([0, 5])), TypeError, "cu_seqlens must be int32"),
        (
            lambda s: s(torch.randn(5, D), cu_seqlens=torch.tensor([0, 4], dtype=torch.int32)),
            ValueError,
            "cu_seqlens must end at T=5, got 4",
        ),
        (lambda s: fp.VisionSelector(0, 4), ValueError, "in_features=0 must be at least 1"),
        (lambda s: fp.VisionSelector(4, 2.5), TypeError, "hidden must be a host int"),
    ],
)
def test_wrong_input_is_named(scorer, call, error, message):
    with pytest.raises(error, match=message):
        call(scorer)


# --- trained weights


@pytest.mark.parametrize(
    "prefix", ["", "importance_scorer.", "visual.importance_scorer.", "module.model.importance_scorer."]
)
def test_weights_load_under_any_prefix(tmp_path, scorer, prefix):
    state = {prefix + name: tensor for name, tensor in scorer.state_dict().items()}
    if prefix:  # a whole model's checkpoint: its attention has projections of the same names
        state |= {f"model.layers.0.self_attn.{name}": torch.ones(3) for name in KEYS}
    save_file({name: tensor.clone() for name, tensor in state.items()}, tmp_path / "model.safetensors")
    features = torch.randn(9, D)
    for source in (state, tmp_path / "model.safetensors", str(tmp_path / "model.safetensors")):
        loaded = fp.VisionSelector.from_checkpoint(source)
        assert (loaded.in_features, loaded.hidden, loaded.training) == (D, HIDDEN, False)
        assert all(torch.equal(weight, scorer.state_dict()[name]) for name, weight in loaded.state_dict().items())
        torch.testing.assert_close(loaded(features), scorer(features))
        assert not loaded(features).requires_grad


def test_weights_keep_their_dtype(scorer):
    assert fp.VisionSelector.from_checkpoint(scorer.bfloat16().state_dict()).q_proj.weight.dtype == torch.bfloat16


def message_of(source):
    with pytest.raises(ValueError) as caught:
        fp.VisionSelector.from_checkpoint(source)
    return str(caught.value)


def test_every_missing_key_is_listed(scorer):
    state = scorer.state_dict(prefix="importance_scorer.")
    del state["importance_scorer.q_proj.bias"], state["importance_scorer.k_proj.weight"]
    message = message_of(state)
    assert "missing: …importance_scorer.q_proj.bias" in message
    assert "missing: …importance_scorer.k_proj.weight" in message
    assert "q_proj.weight" not in message
    assert all(f"missing: …importance_scorer.{name}" in message_of({}) for name in KEYS)


def test_every_wrong_shape_is_listed(scorer):
    state = scorer.state_dict(prefix="visual.importance_scorer.")
    state["visual.importance_scorer.q_proj.bias"] = torch.zeros(HIDDEN + 1)
    state["visual.importance_scorer.k_proj.weight"] = torch.zeros(HIDDEN, D + 1)
    state["visual.importance_scorer.k_proj.bias"] = torch.zeros(HIDDEN, dtype=torch.int64)
    message = message_of(state)
    assert "visual.importance_scorer.q_proj.bias must be [16], got [17]" in message
    assert "visual.importance_scorer.k_proj.weight must be [16, 24], got [16, 25]" in message
    assert "visual.importance_scorer.k_proj.bias must be floating point, got torch.int64" in message


def test_weights_of_the_wrong_rank_are_listed():
    message = message_of({name: torch.zeros(2, 2, 2) for name in KEYS})
    assert message.count("[hidden, in_features], got [2, 2, 2]") == 2
    assert message.count("[hidden], got [2, 2, 2]") == 2


def test_two_scorers_are_ambiguous(scorer):
    state = scorer.state_dict(prefix="a.importance_scorer.") | scorer.state_dict(prefix="b.importance_scorer.")
    message = message_of(state)
    assert (
        "q_proj.weight found 2 times: a.importance_scorer.q_proj.weight, b.importance_scorer.q_proj.weight" in message
    )


def test_a_file_that_is_no_safetensors_file(tmp_path):
    broken = tmp_path / "model.safetensors"
    broken.write_bytes(b"not tensors")
    assert f"{broken} is not a safetensors file" in message_of(broken)
    with pytest.raises(FileNotFoundError, match="absent"):
        fp.VisionSelector.from_checkpoint(tmp_path / "absent.safetensors")
