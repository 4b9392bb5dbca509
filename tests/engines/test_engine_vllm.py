import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import vllm.plugins
import vllm.utils.torch_utils
from examples import tiny_models
from tests.engines import contract
from vllm.engine import arg_utils
from vllm.model_executor.models import nano_nemotron_vl, qwen2_5_vl, qwen3_vl, registry
from vllm.multimodal.video_prune import evs, vidcom2
from vllm.transformers_utils.processors import nano_nemotron_vl as nano_nemotron_processor

from flashprune.integrations import video as integration
from flashprune.integrations import vllm as plugin

COUNT, MASK = "compute_retained_tokens_count", "compute_retention_mask"
SOURCES = {"evs": evs, "vidcom2": vidcom2}
THEIRS = {rule: (getattr(module, COUNT), getattr(module, MASK)) for rule, module in SOURCES.items()}
# Everywhere that vLLM holds the functions: the module, its name there, the rule.
HOLDERS = [
    (evs, COUNT, "evs"),
    (evs, MASK, "evs"),
    (vidcom2, COUNT, "vidcom2"),
    (vidcom2, MASK, "vidcom2"),
    (qwen2_5_vl, COUNT, "evs"),
    (qwen2_5_vl, MASK, "evs"),
    (qwen3_vl, COUNT, "evs"),
    (qwen3_vl, MASK, "evs"),
    (qwen3_vl, "vidcom2_" + COUNT, "vidcom2"),
    (qwen3_vl, "vidcom2_" + MASK, "vidcom2"),
    (nano_nemotron_vl, COUNT, "evs"),
    (nano_nemotron_vl, MASK, "evs"),
    (nano_nemotron_processor, COUNT, "evs"),
]


@pytest.fixture
def load(settings: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Loads the plugins as each of vLLM's processes does."""
    settings.setenv("VLLM_PLUGINS", "flashprune")

    def load(method: str | None, **options: str) -> None:
        for name, value in contract.environment(method, **options).items() if method else ():
            settings.setenv(name, value)
        settings.setattr(vllm.plugins, "plugins_loaded", False)
        vllm.plugins.load_general_plugins()

    yield load
    plugin.unregister()


def test_the_list_of_holders_is_complete() -> None:
    found = {
        (name, attribute)
        for name, module in list(sys.modules.items())
        if name.startswith("vllm.")
        for attribute, value in list(vars(module).items())
        if any(value is theirs for pair in THEIRS.values() for theirs in pair)
    }
    assert found == {(module.__name__, name) for module, name, _ in HOLDERS}


def test_without_a_method_nothing_changes(load: Callable[..., None]) -> None:
    load(None)
    assert all(getattr(module, name) in THEIRS[rule] for module, name, rule in HOLDERS)


def test_every_holder_calls_ours_and_a_second_load_changes_nothing(load: Callable[..., None]) -> None:
    load("mmr")
    held = [getattr(module, name) for module, name, _ in HOLDERS]
    for function, (_, name, rule) in zip(held, HOLDERS, strict=True):
        assert isinstance(function.__self__, integration.Pruning) and function.__self__.rule == rule
        assert function.__name__ == ("retention_mask" if name.endswith(MASK) else "retained_tokens")
    load("mmr")
    assert all(getattr(module, name) is function for function, (module, name, _) in zip(held, HOLDERS, strict=True))


def test_unloading_restores_also_what_was_imported_since(load: Callable[..., None]) -> None:
    load("topk")
    late = ModuleType("vllm.late")
    sys.modules["vllm.late"] = late
    try:
        exec(f"from {evs.__name__} import {MASK} as mask", vars(late))
        assert vars(late)["mask"].__self__.settings.method == "topk"
        plugin.unregister()
        assert vars(late)["mask"] is THEIRS["evs"][1]
    finally:
        del sys.modules["vllm.late"]
    for module, name, rule in HOLDERS:
        assert getattr(module, name) is THEIRS[rule][name.endswith(MASK)]


@pytest.mark.parametrize("method", contract.VARIANTS)
def test_counts_are_vllms(load: Callable[..., None], method: str) -> None:
    load(method, **contract.VARIANTS[method])
    for rule, module in SOURCES.items():
        theirs = THEIRS[method if method in THEIRS else rule][0]
        for tokens_per_frame, frames, q in contract.sizes():
            ours = getattr(module, COUNT)(tokens_per_frame=tokens_per_frame, num_frames=frames, q=q)
            assert ours == theirs(tokens_per_frame, frames, q), (rule, tokens_per_frame, frames, q)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", contract.VARIANTS)
def test_masks_hold_as_many_as_counted(load: Callable[..., None], method: str, dtype: torch.dtype) -> None:
    load(method, **contract.VARIANTS[method])
    for module in SOURCES.values():
        for frames, rows, columns, merge, q in (
            (5, 4, 6, 2, 0.7),
            (1, 8, 8, 2, 0.5),
            (9, 3, 5, 1, 0.95),
            (4, 5, 7, 2, 0),
        ):
            features = contract.video(frames, rows // merge, columns // merge, dtype=dtype)
            expected = getattr(module, COUNT)((rows // merge) * (columns // merge), frames, q)
            thw = (frames, rows, columns)
            masks = [getattr(module, MASK)(features, size, merge, q) for size in (thw, list(thw), torch.tensor(thw))]
            assert masks[0].dtype == torch.bool and masks[0].shape == (features.shape[0],)
            assert int(masks[0].sum()) == expected
            assert all(torch.equal(mask, masks[0]) for mask in masks)


@pytest.mark.parametrize("method", ["evs", "vidcom2"])
@pytest.mark.parametrize("seed", range(5))
def test_masks_of_vllms_methods_are_vllms(load: Callable[..., None], method: str, seed: int) -> None:
    load(method)
    for frames, rows, columns, merge, q in ((8, 12, 16, 2, 0.5), (13, 7, 9, 1, 0.75), (3, 28, 28, 2, 0.9)):
        features = contract.video(frames, rows // merge, columns // merge, seed=seed)
        thw = (frames, rows, columns)
        ours = getattr(SOURCES[method], MASK)(features, thw, spatial_merge_size=merge, q=q)
        assert torch.equal(ours, THEIRS[method][1](features, thw, merge, q)), (thw, merge, q)


def test_the_rate_replaces_vllms(load: Callable[..., None]) -> None:
    load("maxmin", RATE="0.75")
    assert qwen2_5_vl.compute_retained_tokens_count(64, 8, 0.1) == 128
    features = contract.video(8, 8, 8)
    assert qwen2_5_vl.compute_retention_mask(features, (8, 16, 16), spatial_merge_size=2, q=0.1).sum() == 128


def test_qwen2_5_vl_prunes_by_our_mask_and_keeps_positions(
    load: Callable[..., None], settings: pytest.MonkeyPatch
) -> None:
    load("mmr")
    settings.setattr(vllm.utils.torch_utils, "PIN_MEMORY", False)  # there is no GPU to pin for
    model = SimpleNamespace(
        visual=SimpleNamespace(spatial_merge_size=2),
        config=SimpleNamespace(vision_config=SimpleNamespace(tokens_per_second=2)),
        video_pruning_rate=0.75,
    )
    sizes = torch.tensor([[4, 8, 12], [6, 8, 8]])
    embeddings = tuple(contract.video(t, h // 2, w // 2, seed=seed) for seed, (t, h, w) in enumerate(sizes.tolist()))
    given = {"video_grid_thw": sizes, "second_per_grid_ts": torch.tensor([1.0, 1.0])}
    function: Any = qwen2_5_vl.Qwen2_5_VLForConditionalGeneration._postprocess_video_embeds_evs
    before = integration.counters()
    outputs = function(model, embeddings, given)
    for output, size, features in zip(outputs, sizes, embeddings, strict=True):
        mask = qwen2_5_vl.compute_retention_mask(features, size, spatial_merge_size=2, q=0.75)
        t, h, w = size.tolist()
        assert output.shape[0] == qwen2_5_vl.compute_retained_tokens_count(h * w // 4, t, 0.75) < features.shape[0]
        assert torch.equal(output[:, :-4], features[mask])
        place = torch.cartesian_prod(torch.arange(t) * 2, torch.arange(h // 2), torch.arange(w // 2))
        assert torch.equal(output[:, -4:-1].long(), place[mask])
    assert integration.counters()["videos"] == before["videos"] + 4


@pytest.mark.parametrize("named", ["evs", "vidcom2"])
def test_qwen3_vl_prunes_by_our_mask(load: Callable[..., None], named: str) -> None:
    load("mis", IMPORTANCE="norm")

    def finish(video_embeddings: torch.Tensor, num_tokens_per_frame: list[int], **rest: Any) -> torch.Tensor:
        assert sum(num_tokens_per_frame) == video_embeddings.shape[0]
        return video_embeddings

    model = SimpleNamespace(
        visual=SimpleNamespace(spatial_merge_size=2),
        is_multimodal_pruning_enabled=True,
        video_pruning_rate=0.6,
        video_pruning_method=named,
        _create_final_video_embeddings=finish,
    )
    features = contract.video(5, 4, 6)
    given = SimpleNamespace(timestamps=[[0.0, 1.0, 2.0, 3.0, 4.0]])
    given = type("Given", (dict,), vars(given))(video_grid_thw=torch.tensor([[5, 8, 12]]))
    function: Any = qwen3_vl.Qwen3VLForConditionalGeneration._postprocess_video_embeds_evs
    [output] = function(model, (features,), given)
    mask = SOURCES[named].compute_retention_mask(features, (5, 8, 12), 2, 0.6)
    assert torch.equal(output, features[mask])
    assert output.shape[0] == SOURCES[named].compute_retained_tokens_count(24, 5, 0.6) == 48


def test_nemotron_prunes_by_our_mask(load: Callable[..., None]) -> None:
    load("vidcom2")
    features = contract.video(5, 4, 6)

    def finish(embeddings: torch.Tensor, num_tokens_per_frame: list[int], *rest: Any, **more: Any) -> torch.Tensor:
        assert sum(num_tokens_per_frame) == embeddings.shape[0]
        return embeddings

    model = SimpleNamespace(
        video_temporal_patch_size=1,
        video_pruning_rate=0.6,
        config=SimpleNamespace(downsample_ratio=0.5, patch_size=16),
        _process_image_input=lambda given: (features,),
        _create_final_video_embeddings=finish,
    )
    given = {
        "pixel_values_flat": torch.zeros(5, 3, 128, 192),
        "num_patches": torch.tensor([5]),
        "frames_indices": torch.arange(5),
        "frame_duration_ms": torch.tensor([500]),
    }
    function: Any = nano_nemotron_vl.NemotronH_Nano_VL_V2._process_video_input
    [output] = function(model, given)
    mask = THEIRS["vidcom2"][1](features, (5, 4, 6), 1, 0.6)
    assert torch.equal(output, features[mask])
    assert output.shape[0] == nano_nemotron_processor.compute_retained_tokens_count(24, 5, 0.6) == 48


def test_a_model_imported_after_the_plugin_finds_ours() -> None:
    program = """
import vllm.plugins
from vllm.config.logging import LoggingConfig
from vllm.logger import configure_logging
configure_logging(LoggingConfig())  # as the engine's and the workers' processes begin
vllm.plugins.load_general_plugins()
from tests.engines import conftest
from vllm.model_executor.models import qwen3_vl
print(qwen3_vl.compute_retention_mask.__self__.settings.method, qwen3_vl.vidcom2_compute_retention_mask.__self__.rule)
"""
    done = contract.run(program, contract.environment("mmr") | {"VLLM_PLUGINS": "flashprune"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "mmr vidcom2"
    assert "flashprune prunes videos: mmr by redundancy, the engine's rate, backend auto" in done.stdout + done.stderr


LOAD = "import vllm.plugins; vllm.plugins.load_general_plugins(); print('started')"


@pytest.mark.parametrize("wrong", ["by the prompt", "rate"])
def test_wrong_settings_stop_the_process_with_one_line(wrong: str) -> None:
    given, line = contract.WRONG[wrong]
    environment = {"FLASHPRUNE_VIDEO_" + name: value for name, value in given.items()}
    done = contract.run(LOAD, environment | {"VLLM_PLUGINS": "flashprune"})
    assert done.returncode == 1 and "started" not in done.stdout
    assert done.stderr.splitlines()[-1].startswith(f"flashprune: {line}") and "Traceback" not in done.stderr


def test_another_version_is_refused_unless_insisted_on(load: Callable[..., None], settings: pytest.MonkeyPatch) -> None:
    settings.setattr(plugin, "CHECKED", "0.32.9")
    with pytest.raises(SystemExit, match=r"^flashprune: checked with vllm 0\.32\.9, found 0\.33\.0"):
        load("evs")
    assert evs.compute_retention_mask is THEIRS["evs"][1]
    settings.setenv("FLASHPRUNE_UNCHECKED_ENGINE", "1")
    load("evs")
    assert evs.compute_retention_mask is not THEIRS["evs"][1]


def test_functions_with_other_parameters_are_refused(load: Callable[..., None], settings: pytest.MonkeyPatch) -> None:
    settings.setattr(vidcom2, COUNT, lambda tokens, frames, rate: 0)
    with pytest.raises(SystemExit, match="takes tokens, frames, rate; expected tokens_per_frame, num_frames, q"):
        load("evs")
    assert getattr(evs, COUNT) is THEIRS["evs"][0]


@pytest.mark.parametrize(
    ("family", "rate", "why"),
    [
        ("qwen2_5_vl", {}, "give vLLM --video-pruning-rate above 0"),
        ("qwen2_5_vl", {"video_pruning_rate": 0.0}, "give vLLM --video-pruning-rate above 0"),
        ("qwen2_5_vl", {"video_pruning_rate": 0.5}, None),
        ("qwen2_vl", {"video_pruning_rate": 0.5}, "vLLM has no pruning for Qwen2VLForConditionalGeneration"),
    ],
)
def test_a_configuration_that_prunes_no_video_is_told(
    load: Callable[..., None],
    settings: pytest.MonkeyPatch,
    tmp_path: Path,
    family: str,
    rate: dict[str, float],
    why: str | None,
) -> None:
    model, processor = tiny_models.build(family)
    model.config.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    settings.setattr(registry, "_run_in_subprocess", lambda look: look())  # where torchvision has its stand-in
    theirs = arg_utils.EngineArgs.create_model_config
    settings.setattr(logging.getLogger("vllm.flashprune"), "level", logging.WARNING)  # as before logging is set up
    logging.getLogger("vllm.flashprune").manager._clear_cache()
    load("mmr")
    told: list[str] = []
    settings.setattr(integration, "warn_of_no_effect", lambda settings, why, logger: told.append(why))
    settings.setattr(integration, "announce", lambda settings, logger: told.append("prunes"))
    arg_utils.EngineArgs(model=str(tmp_path), **rate).create_model_config()
    assert len(told) == 1 and told[0].startswith(why or "prunes")
    plugin.unregister()
    assert arg_utils.EngineArgs.create_model_config is theirs


def test_vllm_under_another_name_is_found() -> None:
    program = "import importlib.metadata as m, vllm; v = m.version\n"
    program += "def version(name):\n if name == 'vllm': raise m.PackageNotFoundError(name)\n return v(name)\n"
    program += f"m.version = version; {LOAD}; from vllm.multimodal.video_prune.evs import {MASK} as mask\n"
    done = contract.run(program + "print(mask.__self__.settings.method)", contract.environment("evs"))
    assert done.returncode == 0 and done.stdout.splitlines()[-2:] == ["started", "evs"], done.stderr
