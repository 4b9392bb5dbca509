"""The table of launch configurations."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("triton")

import torch
from flashprune.triton_kernels import configs, similarity

COSINES = ("cosines", "cosines unaligned", "cosines spatial")


@pytest.mark.parametrize("kind", configs.TABLE)
def test_every_size_has_one_configuration(kind: str) -> None:
    """Sizes rise from row to row, to the end, for every class of devices and data type."""
    for device in configs.SHARED_MEMORY:
        for dtype in configs.EVERY.split():
            sizes = [most for most, _ in configs.buckets(kind, dtype, device)]
            assert sizes == sorted(set(sizes)) and sizes[-1] >= 256
            for most, constants in configs.buckets(kind, dtype, device):
                assert configs.choose(kind, dtype, device, most) is constants
                assert {"num_warps", "num_stages"} <= set(constants)


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


@pytest.mark.parametrize("dtype", configs.EVERY.split())
def test_a_cosine_is_summed_alike_in_every_tile(dtype: str) -> None:
    """So many products on tensor cores, then a float32 sum: a pair must not depend on the kernel that multiplies it."""
    for device in configs.SHARED_MEMORY:
        depths = {c["BLOCK_D"] for kind in COSINES for _, c in configs.buckets(kind, dtype, device)}
        assert depths == {c["DEPTH"] for kind in ("greedy", "dpp") for _, c in configs.buckets(kind, dtype, device)}
        assert len(depths) == 1


def test_rows_that_are_not_aligned_take_another_tile() -> None:
    features = torch.empty(100, 64, dtype=torch.bfloat16)
    for other in (features[:, 1:], features[:, :63]):
        assert similarity.cosine_config(other) != similarity.cosine_config(features)
