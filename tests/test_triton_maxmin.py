"""The Triton max-min against the definition."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

import torch
from flashprune.triton_kernels.maxmin import maxmin_select
from torch import Tensor

import flashprune as fp
from inputs import ADVERSARIAL, adversarial, gaussian, signs


def defined(features: Tensor, k: int | list[int], **settings: object) -> Tensor:
    return fp.reference.maxmin_select(features.double().cpu(), k, sort=False, **settings)


def check(features: Tensor, k: int) -> None:
    picks = maxmin_select(features, [k], None, False)
    fp.testing.check_selection("maxmin", features, picks=picks, k=k).raise_if_bad()


@pytest.mark.parametrize("n, k", [(1, 1), (2, 2), (17, 17), (33, 9), (64, 20)])
def test_exact(n: int, k: int, device: torch.device) -> None:
    features = signs(n, 16, seed=n).to(device)
    picks = maxmin_select(features, [k], None, False)
    assert picks.cpu().equal(defined(features, k))
    assert maxmin_select(features, [k], None, True).equal(picks.sort().values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_within_rounding(dtype: torch.dtype, device: torch.device) -> None:
    check(gaussian(50, 40)[0].to(device, dtype), 20)


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_adversarial(name: str, device: torch.device) -> None:
    check(adversarial(name, 40)[0].to(device), 20)


def test_packed_segments(device: torch.device) -> None:
    sizes, ks = [0, 40, 1, 35, 7], [0, 12, 1, 9, 0]
    starts = torch.tensor([0, *sizes]).cumsum(0)
    features, cu_seqlens = signs(sum(sizes), 16).to(device), starts.to(device, torch.int32)
    picks = maxmin_select(features, ks, cu_seqlens, False)
    assert picks.cpu().equal(defined(features, ks, cu_seqlens=cu_seqlens.cpu()))
    ascending = maxmin_select(features, ks, cu_seqlens, True)
    assert ascending.equal(torch.cat([x.sort().values for x in picks.split(ks)]))


def test_batch_and_strides(device: torch.device) -> None:
    features = signs(2, 30, 40).to(device)
    for view in (features[..., :16], features[..., 1:17], features[0, :, 3:19]):
        assert maxmin_select(view, [8], None, False).cpu().equal(defined(view, 8))
    assert maxmin_select(features, [0], None, False).shape == (2, 0)
