"""Our video selections beside vLLM's own functions as installed, not re-writes of them, in one run.

`.venv-engines/bin/python -m benchmarks.engines`, in the environment of `tests/engines`, prints a Markdown table. Masks
are checked first: a mask of another choice than the definition's is not timed.
"""

from __future__ import annotations

import statistics
from datetime import date
from functools import partial
from importlib.metadata import version

import torch

from benchmarks import machine
from benchmarks.race import OURS, Race, picks_check, run
from flashprune.integrations.video import Pruning, Settings

VIDEOS = ((8, 28, 28), (16, 28, 28), (32, 28, 28), (16, 56, 56))  # frames, and patches of a frame; 2 x 2 a token
DIM, Q, SECONDS = 3584, 0.75, 2.0


def race(method: str, thw: tuple[int, int, int], peers: dict) -> Race:
    """The mask of one video, as a model of the engine asks for it."""
    torch.manual_seed(0)
    frames, places = thw[0], thw[1] * thw[2] // 4
    still = torch.randn(places, DIM) + 0.3 * torch.randn(frames, places, DIM)  # each frame like the one before
    features = still.flatten(0, 1)
    right = picks_check(method, features, thw=thw, merge=2, q=Q, sort=True)
    ours = Pruning(Settings(method)).retention_mask
    return Race(
        ours=partial(ours, features, thw, 2, Q),
        peers={name: partial(mask, features, thw, 2, Q) for name, mask in peers.items()},
        check=lambda mask: right(mask.nonzero().flatten()),
    )


def main() -> None:
    from vllm.multimodal.video_prune import evs, vidcom2

    name = f"vLLM {version('vllm')}"
    peers = {"evs": {name: evs.compute_retention_mask}, "vidcom2": {name: vidcom2.compute_retention_mask}}
    facts = machine.facts("cpu")
    print(f"{facts['cpu']}, {torch.get_num_threads()} threads, torch {torch.__version__}, commit {machine.commit()},")
    print(f"{date.today()}. float32, D = {DIM}, a quarter kept; medians (min–max) of runs in turns, after a check")
    print("of every mask against the definition.\n")
    print("| method | tokens | function | ms | × flashprune |\n|---|---|---|---|---|")
    for method, functions in peers.items():
        for thw in VIDEOS:
            outcome = run(race(method, thw, functions), SECONDS)
            for name in (OURS, *functions):
                cells = [method, str(thw[0] * thw[1] * thw[2] // 4), name]
                if name in outcome.samples:
                    times = [1e3 * one for one in outcome.samples[name]]
                    cells.append(f"{statistics.median(times):.2f} ({min(times):.2f}–{max(times):.2f})")
                    cells.append("" if name == OURS else f"{outcome.ratio(name):.1f}")
                else:
                    cells += [outcome.failures[name], ""]
                print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
