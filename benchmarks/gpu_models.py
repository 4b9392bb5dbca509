"""What pruning changes in the prefill of models of real width: LLaVA-1.5-7B's and Qwen2.5-VL-7B's, with random weights.

`python -m benchmarks.gpu_models` prints a Markdown table, for bfloat16 on a GPU; `--tiny` tries it with tiny models on
any machine. Random weights change neither shapes nor the work of a kernel, but which tokens are kept.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from datetime import date
from typing import Any

import torch
from examples import tiny_models
from PIL import Image

from benchmarks import machine
from flashprune.integrations.transformers import Prior
from flashprune.integrations.transformers.profiling import Profile, Variant, measure

RUNS = 15
SIZES = {"llava": (336, 336), "qwen2_5_vl": (1680, 1344)}  # width, height: 576 and 2880 visual tokens
KEEPS = (0.25, 0.1)


def variants(width: int) -> list[Variant]:
    """Without pruning, and with each method at each keep; scorer and prior random, as the weights are."""
    import flashprune as fp

    torch.manual_seed(0)
    scorer = fp.VisionSelector(width, width // 8)
    settings: dict[str, dict[str, Any]] = {
        "idpruner": {"scorer": scorer},
        "divprune": {},
        "topk": {"importance": "received_attention"},
        "d2pruner": {"prior": Prior.of_tensor(torch.rand(24, 24) + 0.1), "alpha": 0.5},
        "fastv": {},
    }
    return [Variant(), *(Variant(name, keep, more) for name, more in settings.items() for keep in KEEPS)]


def profile(family: str, width: str, device: str, dtype: torch.dtype, runs: int) -> tuple[Any, list[Profile]]:
    """The model's config, and a profile of each variant on one image that fills the model's grid."""
    model, processor = tiny_models.build(family, width, dtype=dtype, device=device)
    noise = torch.randint(0, 256, (SIZES[family][1], SIZES[family][0], 3), dtype=torch.uint8)
    inputs = tiny_models.inputs(processor, [[Image.fromarray(noise.numpy())]], ["Describe the image in one sentence."])
    hidden = model.base_model.language_model.config.hidden_size
    tried = variants(hidden)
    for variant in tried:
        if "scorer" in variant.settings:
            variant.settings["scorer"].to(device, dtype)
    return model.config, measure(model, inputs.to(device, dtype), tried, runs=runs)


def table(profiles: Sequence[Profile]) -> list[str]:
    """Markdown rows, medians of interleaved runs."""
    rows = [
        "| method | visual tokens | prefill, ms | selection, ms | share | first token, ms | KV cache, MB | backend |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in profiles:
        prefill, selection, first = (
            1e3 * statistics.median(samples) for samples in (one.prefill, one.selection, one.first_token)
        )
        chosen = (f"{selection:.3f}", f"{selection / prefill:.1%}") if one.variant.method else ("", "")
        cells = (
            one.variant.method or "none",
            f"{one.tokens} → {one.kept}",
            f"{prefill:.2f} ({1e3 * min(one.prefill):.2f}–{1e3 * max(one.prefill):.2f})",
            *chosen,
            f"{first:.2f}",
            f"{one.cache_bytes / 1e6:.1f}",
            one.backend,
        )
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="tiny models in float32, on the CPU where there is no GPU")
    parser.add_argument("--runs", type=int, default=RUNS)
    options = parser.parse_args()
    if not options.tiny and not torch.cuda.is_available():
        raise SystemExit("no GPU: torch.cuda.is_available() is False")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype, width = (torch.float32, "tiny") if options.tiny else (torch.bfloat16, "real")
    facts = machine.facts(device)
    print(f"{facts.get('gpu', facts['cpu'])}, torch {torch.__version__}, {date.today()}, {width} width, {dtype}")
    for family in SIZES:
        config, profiles = profile(family, width, device, dtype, options.runs)
        text = config.get_text_config()
        print(f"\n## {family}: {text.num_hidden_layers} layers of {text.hidden_size}, one image, random weights\n")
        print("\n".join(table(profiles)), flush=True)
        if device == "cuda":
            torch.cuda.empty_cache()
    print(
        f"\nMedians (min–max) of {options.runs} interleaved runs after a warm-up. Prefill: the language model with the "
        "selection, without encoding the image; first token: `generate` of one token, from pixels. Importance from "
        "the encoder's attention (topk) is computed while encoding: in the first token only."
    )


if __name__ == "__main__":
    main()
