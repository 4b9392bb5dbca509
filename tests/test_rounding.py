"""Numbers that decide a choice are rounded one operation at a time on every backend: what ties in the reference ties
everywhere, also where a fused multiply-add would tell the candidates apart."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flashprune import native
from inputs import Variant, operator

CHIPS = (80, 90, 100, 120)
ALPHA, LAM = 0.3, 0.7
COSINES = [c / 32 for c in (-31, -21, -13, -5, 3, 11, 19, 27)]  # times 0.3 they do not fit float32


def fused(a: float, b: float, c: float) -> np.float32:
    """a * b + c rounded once: float64 holds the product of two float32 exactly, and such sums with them."""
    return np.float32(np.float64(np.float32(a)) * np.float64(np.float32(b)) + np.float64(np.float32(c)))


def rows(*cosines: float) -> Tensor:
    """Row 0 and rows with these cosines to it, of ±1."""
    features = torch.ones(1 + len(cosines), 64)
    for row, cosine in enumerate(cosines, 1):
        features[row, : round(32 * (1 - cosine))] = -1.0
    return features


def tied_importance(nearer: float, farther: float, start: float) -> tuple[np.float32, np.float32] | None:
    """Importance of two tokens of these cosines to the first pick: equal scores, unequal ones with a fused step.

    The second of them, which loses a tie, has the greater fused score.
    """
    lam, rest = np.float32(LAM), np.float32(1 - LAM)
    one = np.float32(start)
    score = lam * one - rest * np.float32(nearer)
    other = np.float32((score + rest * np.float32(farther)) / lam)
    for _ in range(3):
        other = np.nextafter(other, np.float32(-np.inf))
    for _ in range(7):
        tied = lam * other - rest * np.float32(farther) == score
        if tied and fused(-rest, farther, lam * other) > fused(-rest, nearer, lam * one):
            return one, other
        other = np.nextafter(other, np.float32(np.inf))
    return None


def mmr_ties() -> tuple[Tensor, Tensor]:
    found = []
    for nearer in COSINES:
        for farther in COSINES:
            for start in np.linspace(0.1, 0.9, 40):
                pair = tied_importance(nearer, farther, start) if nearer != farther else None
                if pair:
                    found.append((rows(nearer, farther), torch.tensor([4.0, *map(float, pair)])))
                    break
    features, importance = zip(*found, strict=True)
    return torch.stack(features), torch.stack(importance)


def emulated(op: str) -> Callable[..., Tensor]:
    library = Path(native.__file__).parent / "libflashprune_emulated.so"
    if not library.exists():
        pytest.skip("the emulated CUDA operators are not built")
    torch.ops.load_library(library)
    return getattr(torch.ops.flashprune_emulated, f"{op}_select")


def interpreted(op: str) -> Callable[..., Tensor]:
    pytest.importorskip("triton")
    from flashprune.triton_kernels import mis, mmr

    return {"mis": mis.mis_select, "mmr": mmr.mmr_select}[op]


NATIVE = {"cpu": operator, "cuda": emulated, "triton": interpreted}


def select(
    backend: str, variant: Variant, features: Tensor, importance: Tensor, k: int, device: torch.device
) -> Tensor:
    if backend == "reference":
        return variant.select(features, importance, k, backend="reference", sort=False)
    if backend == "cpu" and native.cpu_status() != "ready":
        pytest.skip(native.cpu_status())
    operands = variant.operands(features, importance, k)
    on = device if backend == "triton" else torch.device("cpu")
    arguments = [x.to(on) if isinstance(x, Tensor) else x for x in operands]
    return NATIVE[backend](variant.method)(*arguments).cpu()


each_backend = pytest.mark.parametrize("backend", ["reference", *NATIVE])


@each_backend
def test_scores_that_tie(backend: str, device: torch.device) -> None:
    features, importance = mmr_ties()
    assert len(features) > 9
    picks = select(backend, Variant("mmr", "mmr", {"lam": LAM}), features, importance, 2, device)
    assert picks.tolist() == [[0, 1]] * len(features)


@each_backend
def test_edges_at_the_threshold(backend: str, device: torch.device) -> None:
    """Neighbours of weight 0.3 cosine + 0.7; what weighs the threshold itself is no edge."""
    alpha, beta, apart = np.float32(ALPHA), np.float32(1 - ALPHA), 0
    for cosine in COSINES:
        weight = alpha * np.float32(cosine) + beta
        apart += fused(alpha, cosine, beta) != weight
        features, importance = rows(cosine, -1.0), torch.tensor([3.0, 2.0, 1.0])
        for threshold, expected in ((weight, [0, 1]), (np.nextafter(weight, np.float32(0)), [0, 2])):
            edge = Variant("edge", "mis", {"threshold": float(threshold), "alpha": ALPHA, "radius": 1})
            assert select(backend, edge, features, importance, 2, device).tolist() == expected, cosine
    assert apart


def test_compiled_triton_does_not_fuse() -> None:
    """In the machine code of the functions that say a score, an edge and a gain."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=True)
    found = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(found) == 3 * len(CHIPS)
    for name, chip, lines in found:
        assert any("FADD" in line for line in lines), (name, chip)
        # a product alone is a fused one with the register of zero
        assert not [line for line in lines if "FFMA" in line and ", RZ" not in line], (name, chip)


def compile_all() -> None:
    """Print the float instructions of every function on every chip, one JSON array a line."""
    import triton
    import triton.language as tl
    from flashprune.triton_kernels import adjacency, dpp, greedy
    from triton.backends.compiler import GPUTarget

    @triton.jit
    def scores(a_ptr, b_ptr, out_ptr, lam, rest, BLOCK: tl.constexpr):
        offs = tl.arange(0, BLOCK)
        keys = greedy.score_keys(tl.load(a_ptr + offs), tl.load(b_ptr + offs), offs, lam, rest)
        tl.store(out_ptr + offs, keys.to(tl.float32))

    @triton.jit
    def edges(a_ptr, b_ptr, out_ptr, alpha, beta, BLOCK: tl.constexpr):
        offs = tl.arange(0, BLOCK)
        weights = adjacency.edge_weight(alpha, tl.load(a_ptr + offs), beta, tl.load(b_ptr + offs))
        tl.store(out_ptr + offs, weights)

    @triton.jit
    def gains(a_ptr, b_ptr, out_ptr, unused, as_well, BLOCK: tl.constexpr):
        offs = tl.arange(0, BLOCK)
        tl.store(out_ptr + offs, dpp.less(tl.load(a_ptr + offs), tl.load(b_ptr + offs)))

    nvdisasm = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    for kernel in (scores, edges, gains):
        for chip in CHIPS:
            types = {name: "*fp32" if name.endswith("_ptr") else "fp32" for name in kernel.arg_names}
            types["BLOCK"] = "constexpr"
            source = triton.compiler.ASTSource(fn=kernel, signature=types, constexprs={"BLOCK": 128})
            binary = triton.compile(source, target=GPUTarget("cuda", chip, 32)).asm["cubin"]
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                file.write(binary)
                file.flush()
                code = subprocess.run([nvdisasm, "-c", file.name], capture_output=True, text=True, check=True).stdout
            lines: list[Any] = [line.strip() for line in code.splitlines() if "FFMA" in line or "FADD" in line]
            print(json.dumps([kernel.fn.__name__, chip, lines]))


if __name__ == "__main__":
    compile_all()
