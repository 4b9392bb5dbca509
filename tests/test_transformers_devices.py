"""A pruned model on each device: what is chosen there is what the reference chooses, and decoding goes on."""

import pytest
import torch

pytest.importorskip("transformers", minversion="5.19")

from examples import tiny_models
from PIL import Image
from tests.vlm import FAMILIES

import flashprune as fp
from flashprune.integrations.transformers import VisualTokens, prune

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: torch.cuda.is_available() is False")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])]
QUESTIONS = ["What is this?", "And what are these two, in a few words?"]


def photo(width: int, height: int, seed: int) -> Image.Image:
    pixels = torch.rand(3, 9, 12, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray((pixels * 255).byte().permute(1, 2, 0).numpy()).resize((width, height))


IMAGES = [[photo(150, 100, 0)], [photo(90, 140, 1), photo(120, 120, 2)]]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_selects_as_the_reference_before_the_llm(family: str, dtype: torch.dtype, device: str) -> None:
    model, processor = tiny_models.build(family, dtype=dtype, device=device)
    inputs = tiny_models.inputs(processor, IMAGES, QUESTIONS).to(device, dtype)
    seen: list[VisualTokens] = []

    def importance(tokens: VisualTokens) -> torch.Tensor:
        seen.append(tokens)
        return tokens.features.float().norm(dim=-1)

    with prune(model, "idpruner", 0.3, importance=importance, scope="image") as handle:
        answer = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert answer.shape[1] == inputs["input_ids"].shape[1] + 4
    assert handle.last is not None and handle.last.seconds > 0
    features, start = seen[0].features, 0
    assert handle.last.backend == fp.dispatch.resolve("auto", "mmr_select", features.device, features.dtype)
    for kept, (n, k) in zip(handle.last.kept, handle.last.counts, strict=True):
        tokens = features[start : start + n].cpu()
        expected = fp.reference.idpruner(tokens, tokens.float().norm(dim=-1), k)
        assert kept.tolist() == expected.tolist()
        start += n


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", FAMILIES)
def test_prunes_inside_the_llm_and_goes_on_decoding(family: str, device: str) -> None:
    """The same tokens and, within what devices differ by, the same logits as one prompt after another on the CPU."""
    model, processor = tiny_models.build(family, device=device)
    one_by_one, _ = tiny_models.build(family)
    inputs = tiny_models.inputs(processor, IMAGES, QUESTIONS).to(device)
    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with prune(model, "fastv", 0.3) as handle:
        together = model.generate(**inputs, **options)
    for row, (images, question) in enumerate(zip(IMAGES, QUESTIONS, strict=True)):
        alone = tiny_models.inputs(processor, [images], [question])
        with prune(one_by_one, "fastv", 0.3) as other:
            answer = one_by_one.generate(**alone, **options)
        assert handle.last is not None and other.last is not None
        assert handle.last.kept[row].tolist() == other.last.kept[0].tolist()
        for ours, theirs in zip(together.logits, answer.logits, strict=True):
            torch.testing.assert_close(ours[row].cpu(), theirs[0], atol=2e-3, rtol=0)
