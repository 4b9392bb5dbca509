"""Every method against what its official code returned on the same inputs (see golden/README.md)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import flashprune as fp

GOLDEN = Path(__file__).parent / "golden"
CASES = json.loads((GOLDEN / "manifest.json").read_text(encoding="utf-8"))
BACKENDS = [
    "reference",
    pytest.param("cpu", marks=pytest.mark.skipif(fp.backends()["cpu"] != "ready", reason=fp.backends()["cpu"])),
]


def cases(*methods: str) -> pytest.MarkDecorator:
    chosen = [case for case in CASES if case["method"] in methods]
    assert chosen
    return pytest.mark.parametrize("case", chosen, ids=[case["file"].removesuffix(".npz") for case in chosen])


def load(case: dict) -> dict[str, torch.Tensor]:
    with np.load(GOLDEN / case["file"]) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def select(case: dict, data: dict[str, torch.Tensor], **options) -> torch.Tensor:
    features, k = data["features"], case["K"]
    if case["method"] == "divprune":
        return fp.divprune(features, k, **options)
    if case["method"] == "cdpruner":
        return fp.cdpruner(features, data["relevance"], k, **options)
    return fp.idpruner(features, data["scores"], k, lam=case["lam"], per_round=case.get("per_round", 1), **options)


@pytest.mark.parametrize("backend", BACKENDS)
@cases("idpruner", "idpruner_per_round", "divprune", "cdpruner")
def test_selection_is_the_official_one(case, backend):
    data = load(case)
    assert torch.equal(select(case, data, backend=backend), data["keep"])
    if "order" in data:
        assert torch.equal(select(case, data, sort=False, backend=backend), data["order"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", ["idpruner", "divprune", "cdpruner"])
def test_all_cases_of_a_width_in_one_packed_call(method, backend):
    by_width: dict[int, list[dict]] = {}
    for case in CASES:
        if case["method"] == method and case.get("lam", 0.5) == 0.5:
            by_width.setdefault(case["D"], []).append(case)
    for batch in by_width.values():
        data = [load(case) for case in batch]
        sizes = torch.tensor([0, *(case["N"] for case in batch)])
        offsets = sizes.cumsum(0)
        packed = {name: torch.cat([d[name] for d in data]) for name in data[0] if name not in ("order", "keep")}
        ks = [case["K"] for case in batch]
        picks = select({**batch[0], "K": ks}, packed, cu_seqlens=offsets.int(), sort=False, backend=backend)
        assert torch.equal(picks, torch.cat([d["order"] + o for d, o in zip(data, offsets, strict=False)]))


@cases("idpruner", "idpruner_per_round", "divprune")
def test_budget_is_the_official_one(case):
    keep = case["keep_ratio"] if "keep_ratio" in case else 1.0 - case["ratio"]
    assert fp.budget(case["N"], keep) == case["K"]


@cases("evs", "vidcom2")
def test_video_budget_is_the_official_one(case):
    frames, h, w = case["thw"]
    tokens_per_frame = h // case["merge"] * (w // case["merge"])
    data = load(case)
    kept = fp.budget(len(data["features"]), 1 - case["q"], rule=case["method"], tokens_per_frame=tokens_per_frame)
    assert len(data["features"]) == frames * tokens_per_frame
    assert kept == case["K"] == int(data["mask"].sum())


@cases("visionselector")
def test_scorer_is_the_official_one(case):
    data = load(case)
    prefix = "visual.importance_scorer."
    scorer = fp.VisionSelector.from_checkpoint(
        {f"{prefix}{p}_proj.{kind}": data[f"{p}_{kind}"] for p in "qk" for kind in ("weight", "bias")}
    )
    assert (scorer.in_features, scorer.hidden) == (case["D"], case["hidden"])
    scores = scorer(data["features"])
    torch.testing.assert_close(scores, data["scores"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fp.soft_topk(scores, case["ratio"]), data["soft_topk"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fp.soft_topk(data["scores"], case["ratio"]), data["soft_topk"], rtol=0, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
@cases("visionselector")
def test_scorer_keeps_the_official_tokens(case, backend):
    data = load(case)
    scorer = fp.VisionSelector.from_checkpoint(
        {f"{p}_proj.{kind}": data[f"{p}_{kind}"] for p in "qk" for kind in ("weight", "bias")}
    )
    k = fp.budget(case["N"], case["ratio"])
    expected = data["scores"].topk(k).indices.sort().values
    assert torch.equal(fp.topk_select(scorer(data["features"]), k, backend=backend), expected)


def test_every_golden_file_is_listed():
    assert {case["file"] for case in CASES} == {path.name for path in GOLDEN.glob("*.npz")}
