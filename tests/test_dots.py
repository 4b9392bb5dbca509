"""The arithmetic of the CPU engine: a pair's product must not depend on the tile, the order or the instruction set."""

import os
import subprocess
import sys

import numpy as np
import pytest

build = pytest.importorskip("flashprune._emulation", reason="built by make test, not in wheels")

SETS = build.runnable()
FUSED = [name for name in SETS if name != "baseline"] or ["baseline"]


def rows(n: int, d: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("d", [1, 15, 16, 17, 1023, 1024, 1025, 3000])
def test_products(isa: str, d: int) -> None:
    a, b = rows(7, d, 0), rows(6, d, 1)
    exact = a.astype(np.float64) @ b.astype(np.float64).T
    bound = 2e-6 * (np.abs(a).astype(np.float64) @ np.abs(b).astype(np.float64).T)
    assert (np.abs(build.dots(isa, a, b) - exact) <= bound).all()


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("m", range(1, 14))
@pytest.mark.parametrize("n", range(1, 10))
def test_same_bits_in_every_tile(isa: str, m: int, n: int) -> None:
    a, b = rows(m, 1100, 2), rows(n, 1100, 3)
    together = build.dots(isa, a, b)
    alone = [[build.dots(isa, a[i : i + 1], b[j : j + 1])[0, 0] for j in range(n)] for i in range(m)]
    np.testing.assert_array_equal(together, alone)
    np.testing.assert_array_equal(together, build.dots(isa, b, a).T)


@pytest.mark.parametrize("isa", FUSED)
def test_same_bits_on_every_instruction_set(isa: str) -> None:
    for d in (5, 64, 1029, 2500):
        a, b = rows(13, d, 4), rows(11, d, 5)
        np.testing.assert_array_equal(build.dots(isa, a, b), build.dots(FUSED[0], a, b))


@pytest.mark.parametrize("isa", SETS)
def test_every_half_is_exact(isa: str) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    np.testing.assert_array_equal(build.widen(isa, bits, "float16"), bits.view(np.float16).astype(np.float32))


@pytest.mark.parametrize("isa", SETS)
def test_every_bfloat16_is_exact(isa: str) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    exact = (bits.astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(build.widen(isa, bits, "bfloat16"), exact)


def test_unknown_instruction_set() -> None:
    with pytest.raises(ValueError, match="'mmx' does not run here"):
        build.dots("mmx", rows(1, 4, 0), rows(1, 4, 1))


SELECT = """
import torch
import flashprune as fp
generator = torch.Generator().manual_seed(6)
x, w = torch.randn(300, 700, generator=generator), torch.rand(300, generator=generator)
for select in (fp.mmr_select, fp.dpp_select):
    print(select(x, w, 75, sort=False, backend="cpu").tolist())
"""


def picks(isa: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "FLASHPRUNE_ISA": isa}
    return subprocess.run([sys.executable, "-c", SELECT], env=environment, capture_output=True, text=True)


def test_the_environment_chooses_the_instruction_set() -> None:
    expected = picks("").stdout
    assert expected
    for isa in FUSED:
        assert picks(isa).stdout == expected
    error = picks("mmx").stderr
    assert f"FLASHPRUNE_ISA=mmx does not run here, only {', '.join(SETS)}" in error
