import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import sglang.srt.plugins
import torch
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.managers.schedule_batch import MultimodalDataItem
from sglang.srt.models import nano_nemotron_vl
from sglang.srt.multimodal.evs import EVS, EVSConfig, EVSEmbeddingResult, EVSProcessor, evs_core, evs_module
from sglang.srt.multimodal.processors import nano_nemotron_vl as nano_nemotron_processor
from sglang.srt.plugins.hook_registry import HookRegistry
from tests.engines import contract

from flashprune.integrations import sglang as plugin
from flashprune.integrations import video as integration

COUNT, MASK = "compute_retained_tokens_count", "compute_retention_mask"
THEIRS = {COUNT: evs_core.compute_retained_tokens_count, MASK: evs_core.compute_retention_mask}
HOLDERS = [(evs_core, COUNT), (evs_core, MASK), (evs_module, MASK)]


class Config(SimpleNamespace):
    """A model's config.json."""


class Model(EVS):
    """A model whose encoder returns what it is given."""

    @staticmethod
    def create_evs_config(config: Config) -> EVSConfig:
        return EVSConfig(video_pruning_rate=config.video_pruning_rate, spatial_merge_size=1)

    def get_video_feature(self, items: list[MultimodalDataItem]) -> torch.Tensor:
        return torch.cat([item.feature for item in items])


@pytest.fixture
def load(settings: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Loads the plugins as each of SGLang's processes does."""
    settings.setenv("SGLANG_PLUGINS", "flashprune")

    def load(method: str | None, **options: str) -> None:
        for name, value in contract.environment(method, **options).items() if method else ():
            settings.setenv(name, value)
        settings.setattr(sglang.srt.plugins, "_plugins_loaded", False)
        sglang.srt.plugins.load_plugins()

    yield load
    plugin.unregister()


def test_the_list_of_holders_is_complete() -> None:
    found = {
        (name, attribute)
        for name, module in list(sys.modules.items())
        if name.startswith("sglang.")
        for attribute, value in list(vars(module).items())
        if any(value is theirs for theirs in THEIRS.values())
    }
    assert found == {(module.__name__, name) for module, name in HOLDERS}


def test_without_a_method_nothing_changes(load: Callable[..., None]) -> None:
    load(None)
    assert all(getattr(module, name) is THEIRS[name] for module, name in HOLDERS)
    assert not any(target.startswith(evs_core.__name__) for target in HookRegistry._hooks)


def test_every_holder_calls_ours_and_a_second_load_changes_nothing(load: Callable[..., None]) -> None:
    load("mmr")
    held = [getattr(module, name) for module, name in HOLDERS]
    assert all(function is not THEIRS[name] for function, (_, name) in zip(held, HOLDERS, strict=True))
    before = integration.counters()["videos"]
    evs_module.compute_retention_mask(contract.video(4, 3, 3), (4, 3, 3), spatial_merge_size=1, q=0.5)
    assert integration.counters()["videos"] == before + 1
    load("mmr")
    assert [getattr(module, name) for module, name in HOLDERS] == held
    plugin.unregister()
    assert all(getattr(module, name) is THEIRS[name] for module, name in HOLDERS)


@pytest.mark.parametrize("method", [method for method in contract.VARIANTS if method != "vidcom2"])
def test_counts_are_sglangs(load: Callable[..., None], method: str) -> None:
    load(method, **contract.VARIANTS[method])
    for tokens_per_frame, frames, q in contract.sizes():
        ours = evs_core.compute_retained_tokens_count(tokens_per_frame=tokens_per_frame, num_frames=frames, q=q)
        assert ours == THEIRS[COUNT](tokens_per_frame, frames, q), (tokens_per_frame, frames, q)


@pytest.mark.parametrize("seed", range(5))
def test_masks_of_evs_are_sglangs(load: Callable[..., None], seed: int) -> None:
    load("evs")
    for frames, rows, columns, merge, q in ((8, 12, 16, 2, 0.5), (13, 7, 9, 1, 0.75), (3, 28, 28, 2, 0.9)):
        features = contract.video(frames, rows // merge, columns // merge, seed=seed)
        thw = (frames, rows, columns)
        ours = evs_module.compute_retention_mask(features, video_size_thw=thw, spatial_merge_size=merge, q=q)
        assert torch.equal(ours, THEIRS[MASK](features, thw, merge, q)), (thw, merge, q)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", contract.VARIANTS)
@pytest.mark.parametrize("frames", [[6], [1], [1, 5]])
def test_a_model_returns_as_many_tokens_as_the_processor_counted(
    load: Callable[..., None], method: str, dtype: torch.dtype, frames: list[int]
) -> None:
    load(method, **contract.VARIANTS[method])
    config = Config(video_pruning_rate=0.7)
    rows, columns = 4, 5
    features = torch.cat([contract.video(count, rows, columns, dtype=dtype) for count in frames])
    create, counted = EVSProcessor(config, {Config: Model}).static_size_data_items(
        frames_per_video=frames, num_images=0, rows=rows, cols=columns
    )
    items = create(input_ids_list=[], image=None, image_offsets=[], video=features, video_offsets=[])
    output: Any = Model(config).get_video_feature(items)
    pruned = isinstance(output, EVSEmbeddingResult)
    assert pruned == (frames != [1])
    embedding = output.embedding if pruned else output
    assert embedding.shape[0] == sum(sum(tokens) for tokens in counted)
    if pruned:
        assert sum(output.num_tokens_per_frame) == embedding.shape[0] < features.shape[0]


def test_nano_nemotron_is_such_a_model() -> None:
    assert issubclass(nano_nemotron_vl.NemotronH_Nano_VL_V2, EVS)
    assert nano_nemotron_processor.EVSProcessor is EVSProcessor


LOAD = "import sglang.srt.plugins as plugins; plugins.load_plugins(); print('started')"


@pytest.mark.parametrize("wrong", ["by the prompt", "rate"])
def test_wrong_settings_stop_the_process_with_one_line(wrong: str) -> None:
    given, line = contract.WRONG[wrong]
    environment = {"FLASHPRUNE_VIDEO_" + name: value for name, value in given.items()}
    done = contract.run(LOAD, environment | {"SGLANG_PLUGINS": "flashprune"})
    assert done.returncode == 1 and "started" not in done.stdout
    assert done.stderr.splitlines()[-1].startswith(f"flashprune: {line}") and "Traceback" not in done.stderr


def test_another_version_is_refused_unless_insisted_on(load: Callable[..., None], settings: pytest.MonkeyPatch) -> None:
    settings.setattr(plugin, "CHECKED", "0.5.22")
    with pytest.raises(SystemExit, match=r"^flashprune: checked with sglang 0\.5\.22, found 0\.5\.23"):
        load("evs")
    assert evs_core.compute_retention_mask is THEIRS[MASK]
    settings.setenv("FLASHPRUNE_UNCHECKED_ENGINE", "1")
    load("evs")
    assert evs_core.compute_retention_mask is not THEIRS[MASK]


def test_an_engine_that_cannot_be_imported_is_named(settings: pytest.MonkeyPatch) -> None:
    settings.setenv("FLASHPRUNE_VIDEO_METHOD", "evs")
    settings.setitem(sys.modules, evs_core.__name__, None)
    with pytest.raises(SystemExit, match=r"^flashprune: cannot import sglang\.srt\.multimodal\.evs\.evs_core"):
        plugin.register()


@pytest.mark.parametrize(
    ("rate", "why"),
    [
        ({}, "SGLang has no pruning for Some"),
        ({"video_pruning_rate": 0.0}, "give SGLang"),
        ({"video_pruning_rate": 0.5}, None),
    ],
)
def test_a_model_of_which_no_video_is_pruned_is_told(
    load: Callable[..., None], settings: pytest.MonkeyPatch, rate: dict[str, float], why: str | None
) -> None:
    """Once, by the main model: SGLang makes the configuration several times, and that of a draft model too."""

    def made(self: Any, is_draft_model: bool = False) -> None:
        self.is_draft_model = is_draft_model
        self.hf_config = Config(architectures=["Some"], **({} if is_draft_model else rate))

    warned: list[str] = []
    settings.setattr(integration, "warn_of_no_effect", lambda settings, why, logger: warned.append(why))
    settings.setattr(ModelConfig, "__init__", made)
    HookRegistry._patched.discard(plugin._CONFIG)
    load("mmr")
    ModelConfig(is_draft_model=True)
    assert warned == []
    ModelConfig()
    ModelConfig()
    assert len(warned) == (why is not None) and all(line.startswith(str(why)) for line in warned)
