"""`text_relevance` against the official code's formula, written out."""

import pytest
import torch

import flashprune as fp


def official(image_embeds: torch.Tensor, text_embeds: torch.Tensor) -> torch.Tensor:
    """As CDPruner's llava_arch.py computes it for one image."""
    image = image_embeds / image_embeds.norm(dim=-1, keepdim=True)
    text = text_embeds / text_embeds.norm(dim=-1, keepdim=True)
    relevance = (-(image @ text.t())).mean(dim=-1)
    return (relevance - relevance.min() + 1e-6) / (relevance.max() - relevance.min())


@pytest.mark.parametrize("texts", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_is_the_official_formula(texts: int, dtype: torch.dtype) -> None:
    torch.manual_seed(texts)
    image, text = torch.randn(100, 24, dtype=dtype), torch.randn(texts, 24, dtype=dtype)
    found = fp.text_relevance(image, text)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found, official(image.to(found.dtype), text.to(found.dtype)), atol=1e-5, rtol=0)


def test_equal_scores_are_ones_and_a_zero_row_has_cosine_zero() -> None:
    text = torch.tensor([[1.0, 0.0]])
    assert fp.text_relevance(torch.ones(3, 2), text).tolist() == [1.0, 1.0, 1.0]
    found = fp.text_relevance(torch.tensor([[1.0, 0.0], [0.0, 0.0], [-1.0, 0.0]]), text)
    torch.testing.assert_close(found, torch.tensor([0.0, 0.5, 1.0]), atol=1e-5, rtol=0)
    assert fp.text_relevance(torch.empty(0, 2), text).shape == (0,)


@pytest.mark.parametrize(
    ("image", "text", "message"),
    [
        (torch.zeros(3, 4, 5), torch.zeros(1, 5), r"image_embeds must be two-dimensional, .* got \[3, 4, 5\]"),
        (torch.zeros(3, 5), torch.zeros(1, 4), r"text_embeds must be \[M, 5\] .*, got \[1, 4\]"),
        (torch.zeros(3, 5), torch.zeros(0, 5), r"text_embeds must be \[M, 5\] with M at least 1, got \[0, 5\]"),
    ],
)
def test_refuses_shapes_that_do_not_fit(image: torch.Tensor, text: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fp.text_relevance(image, text)


def test_refuses_integers() -> None:
    with pytest.raises(TypeError, match="image_embeds must be float32"):
        fp.text_relevance(torch.zeros(3, 5, dtype=torch.int64), torch.zeros(1, 5))
