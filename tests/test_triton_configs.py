"""The table of launch configurations."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("triton")

import torch
from flashprune.triton_kernels import configs, mis, similarity

from inputs import BY_NAME, exact, gaussian

WIDE = configs.choose("cosines", "bf16", "datacenter", 5000)


@pytest.mark.parametrize("kind", configs.TABLE)
def test_every_size_has_one_configuration(kind: str) -> None:
    """Sizes rise from row to row, to the end, for every class of devices and data type."""
    for device in configs.SHARED_MEMORY:
        for dtype in configs.EVERY.split():
            sizes = [most for most, _ in configs.buckets(kind, dtype, device)]
            assert sizes == sorted(set(sizes)) and sizes[-1] >= 256
            for most, constants in configs.buckets(kind, dtype, device):
                assert configs.choose(kind, dtype, device, most) is constants
                assert {"num_warps", "num_stages"} < set(constants)


def test_the_class_of_a_device_is_its_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    kilobytes = {0: 99, 1: 163, 2: 227}
    asked = []

    def properties(device: torch.device) -> SimpleNamespace:
        asked.append(device.index)
        return SimpleNamespace(shared_memory_per_block_optin=kilobytes[device.index] * 1024)

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    configs.device_class.cache_clear()
    for _ in range(2):
        found = [configs.device_class(torch.device("cuda", i)) for i in kilobytes]
        assert found == ["consumer", "datacenter", "datacenter"]
    assert asked == [0, 1, 2]
    configs.device_class.cache_clear()
    assert configs.device_class(torch.device("cpu")) == "consumer"


def test_a_pairs_cosine_in_the_engines_does_not_depend_on_the_size() -> None:
    for kind in ("greedy", "dpp"):
        for device in configs.SHARED_MEMORY:
            for dtype in configs.EVERY.split():
                tiles = [
                    [c.get(name) for name in ("ROWS", "COLS", "DEPTH")] for _, c in configs.buckets(kind, dtype, device)
                ]
                assert all(tile == tiles[0] for tile in tiles)


def test_packed_segments_and_odd_rows_take_small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "device_class", lambda device: "datacenter")
    features = torch.empty(5000, 64, dtype=torch.bfloat16)
    assert similarity.cosine_config(features)["BLOCK_N"] == 128
    bounds = torch.tensor([0, 5000], dtype=torch.int32)
    for other in (features[:, 1:], features[:, :63], features[:4096], features.float()):
        assert similarity.cosine_config(other)["BLOCK_N"] == 64
    assert similarity.cosine_config(features, bounds)["BLOCK_N"] == 64
    assert similarity.cosine_config(features, spatial=True)["BLOCK_N"] == 64


def test_wide_tiles_of_cosines(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tile of long inputs, on short ones."""
    features, _ = gaussian(150, 32)
    moved = features.to(device, torch.float16)
    inverse = similarity.inverse_norms(moved)
    matrix, nearest = similarity.cosine_matrix(moved, inverse), similarity.nearest_other(moved, inverse)
    variant = BY_NAME["mis"]
    signs, scores = exact(variant, 150)
    monkeypatch.setattr(similarity, "config", lambda kind, *_: WIDE if "cosines" in kind else configs.config(kind, *_))
    torch.testing.assert_close(similarity.cosine_matrix(moved, inverse), matrix, rtol=0, atol=1e-6)
    torch.testing.assert_close(similarity.nearest_other(moved, inverse), nearest, rtol=0, atol=1e-6)
    *operands, _ = variant.operands(signs, scores, 60)
    operands = [x.to(device) if isinstance(x, torch.Tensor) else x for x in operands]
    picks = mis.mis_select(*operands, False, 4)
    assert torch.equal(picks.cpu(), variant.define(signs, scores, 60, sort=False))
