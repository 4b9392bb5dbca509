import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

import flashprune as fp
import flashprune_plugins
from flashprune.integrations import versions, video
from flashprune.integrations import vllm as vllm_plugin
from flashprune.integrations.video import Pruning, Settings

PREFIX = "FLASHPRUNE_VIDEO_"
FRAMES, ROWS, COLUMNS = 6, 4, 5
N = FRAMES * ROWS * COLUMNS


def read(**given: str) -> Settings | None:
    return Settings.read({PREFIX + name: value for name, value in given.items()})


def film(seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    still = torch.randn(1, ROWS * COLUMNS, 16, generator=generator)
    noise = torch.randn(FRAMES, ROWS * COLUMNS, 16, generator=generator)
    strength = torch.rand(FRAMES, ROWS * COLUMNS, 1, generator=generator)
    return (still + strength * noise).flatten(0, 1).to(dtype)


def test_settings_from_the_environment() -> None:
    assert read() is None
    assert read(METHOD="") is None
    assert read(METHOD="evs") == Settings("evs")
    assert read(METHOD="mmr", LAMBDA="0.25", IMPORTANCE="norm", RATE="0") == Settings("mmr", "norm", lam=0.25, rate=0.0)
    assert read(METHOD="mis", THRESHOLD="0.6", RATE="0.9") == Settings("mis", threshold=0.6, rate=0.9)
    given = {PREFIX + "METHOD": "topk", "FLASHPRUNE_BACKEND": "reference", "HOME": "/"}
    assert Settings.read(given) == Settings("topk", backend="reference")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"METHOD": "best"}, "METHOD must be one of evs, vidcom2, mmr, mis, maxmin, topk, got 'best'"),
        ({"METHOD": "fastv"}, "METHOD=fastv chooses by the prompt, but engines cache encoded media by the media alone"),
        ({"METHOD": "cdpruner"}, "METHOD=cdpruner chooses by the prompt"),
        ({"METHOD": "d2pruner"}, "METHOD=d2pruner chooses by the prompt"),
        ({"METHOD": "idpruner"}, "importance from weights or a prompt, which an engine has not; .* as mmr"),
        ({"METHOD": "divprune"}, "its selector is here as maxmin"),
        ({"METHOD": "evs", "RATE": "1"}, "RATE=1.0 must be at least 0 and less than 1"),
        ({"METHOD": "evs", "RATE": "-0.1"}, "RATE=-0.1 must be at least 0 and less than 1"),
        ({"METHOD": "evs", "RATE": "nan"}, "RATE=nan must be finite"),
        ({"METHOD": "evs", "RATE": "50%"}, "RATE must be a number, got '50%'"),
        ({"METHOD": "mmr", "LAMBDA": "1.5"}, "LAMBDA=1.5 must be between 0 and 1"),
        ({"METHOD": "mis", "THRESHOLD": "high"}, "THRESHOLD must be a number, got 'high'"),
        ({"METHOD": "topk", "IMPORTANCE": "attention"}, "IMPORTANCE must be one of 'redundancy', 'norm'"),
        ({"METHOD": "evs", "LAMBDA": "0.5"}, "LAMBDA has no effect on FLASHPRUNE_VIDEO_METHOD=evs"),
        ({"METHOD": "topk", "THRESHOLD": "0.5"}, "THRESHOLD has no effect on FLASHPRUNE_VIDEO_METHOD=topk"),
        ({"METHOD": "maxmin", "IMPORTANCE": "norm"}, "IMPORTANCE has no effect on FLASHPRUNE_VIDEO_METHOD=maxmin"),
        ({"METHOD": "evs", "RATIO": "0.5"}, "FLASHPRUNE_VIDEO_RATIO is no setting; there are FLASHPRUNE_VIDEO_METHOD"),
        ({"RATE": "0.5"}, "FLASHPRUNE_VIDEO_RATE is set, but FLASHPRUNE_VIDEO_METHOD is not"),
    ],
)
def test_wrong_settings_name_the_variable(given: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        read(**given)
    assert str(raised.value).startswith(PREFIX) and "\n" not in str(raised.value)


def test_a_wrong_backend_is_named() -> None:
    with pytest.raises(ValueError, match="FLASHPRUNE_BACKEND must be one of 'auto', 'cuda'"):
        Settings.read({PREFIX + "METHOD": "evs", "FLASHPRUNE_BACKEND": "gpu"})


@pytest.mark.parametrize(
    "given", [{"method": "best"}, {"importance": "none"}, {"lam": 2.0}, {"rate": 1.0}, {"backend": "gpu"}]
)
def test_settings_made_by_hand_are_checked_too(given: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        Settings(**({"method": "evs"} | given))  # type: ignore[arg-type]


def by_hand(settings: Settings, features: Tensor, q: float) -> Tensor:
    """Which tokens are kept, in plain torch and the reference."""
    grid, k = (FRAMES, ROWS, COLUMNS), max(ROWS * COLUMNS, int(N * (1 - q)))
    if settings.method == "evs":
        return fp.reference.evs_select(features, grid, 1, q=q)
    if settings.method == "vidcom2":
        return fp.reference.vidcom2_select(features, grid, 1, q=q)
    if settings.method == "maxmin":
        return fp.reference.maxmin_select(features, k)
    if settings.importance == "norm":
        norms = features.float().norm(dim=-1)
        scores = (norms - norms.min()) / (norms.max() - norms.min() + 1e-6)
    else:
        frames = features.float().view(FRAMES, ROWS * COLUMNS, -1)
        cosines = torch.nn.functional.cosine_similarity(frames[1:], frames[:-1], dim=-1)
        scores = torch.cat([torch.ones(1, ROWS * COLUMNS), (1 - cosines) / 2]).flatten()
    if settings.method == "mmr":
        return fp.reference.mmr_select(features, scores, k, lam=settings.lam)
    if settings.method == "mis":
        return fp.reference.mis_select(features, scores, k, threshold=settings.threshold)
    return fp.reference.topk_select(scores, k)


@pytest.mark.parametrize(
    "settings",
    [
        Settings("evs"),
        Settings("vidcom2"),
        Settings("maxmin"),
        Settings("topk"),
        Settings("topk", importance="norm"),
        Settings("mmr"),
        Settings("mmr", importance="norm", lam=0.2),
        Settings("mis"),
        Settings("mis", importance="norm", threshold=0.3),
    ],
    ids=str,
)
def test_masks_are_those_of_the_reference(settings: Settings) -> None:
    for seed in range(3):
        for q in (0.5, 0.7):
            mask = Pruning(settings).retention_mask(film(seed), (FRAMES, ROWS, COLUMNS), 1, q)
            assert mask.nonzero().flatten().tolist() == by_hand(settings, film(seed), q).tolist()


@pytest.mark.parametrize("frames_at_a_time", [1, 2, 3, 5, 6])
def test_redundancy_is_computed_in_parts(frames_at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = video.redundancy(film(), FRAMES)
    assert whole[:20].eq(1).all() and whole[20:].lt(1).all()
    monkeypatch.setattr(video, "_CHUNK", frames_at_a_time * ROWS * COLUMNS * 16)
    assert torch.equal(video.redundancy(film(), FRAMES), whole)


def test_options_change_what_is_kept() -> None:
    """So that the test above would see an option that is not passed on."""
    kept = {
        tuple(by_hand(Settings(**given), film(), 0.7).tolist())  # type: ignore[arg-type]
        for given in (
            {"method": "mmr"},
            {"method": "mmr", "lam": 0.2},
            {"method": "mmr", "importance": "norm"},
            {"method": "mis", "importance": "norm"},
            {"method": "mis", "importance": "norm", "threshold": 0.3},
        )
    }
    assert len(kept) == 5


@pytest.mark.parametrize("method", ["mmr", "mis", "maxmin", "topk"])
def test_counts_follow_the_pair_that_is_replaced(method: str) -> None:
    for rule in ("evs", "vidcom2"):
        pruning = Pruning(Settings(method), rule)
        assert pruning.retained_tokens(64, 8, 0.95) == fp.budget(512, 1 - 0.95, rule=rule, tokens_per_frame=64)
        assert (
            int(pruning.retention_mask(film(), (FRAMES, ROWS, COLUMNS), 1, 0.95).sum())
            == {"evs": 20, "vidcom2": 6}[rule]
        )


def test_evs_and_vidcom2_count_by_their_own_rule() -> None:
    assert Pruning(Settings("evs"), "vidcom2").retained_tokens(64, 8, 0.95) == 64
    assert Pruning(Settings("vidcom2"), "evs").retained_tokens(64, 8, 0.95) == 25


@pytest.mark.parametrize("method", video.METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_repeated_calls_in_any_order_agree(method: str, dtype: torch.dtype) -> None:
    pruning, thw = Pruning(Settings(method)), (FRAMES, 2 * ROWS, 2 * COLUMNS)
    films = [film(seed, dtype) for seed in range(4)]
    first = [pruning.retention_mask(features, thw, 2, 0.6) for features in films]
    again = [pruning.retention_mask(features.clone(), torch.tensor(thw), 2, 0.6) for features in reversed(films)]
    assert all(torch.equal(one, other) for one, other in zip(first, reversed(again), strict=True))
    assert [int(mask.sum()) for mask in first] == [pruning.retained_tokens(ROWS * COLUMNS, FRAMES, 0.6)] * 4


@pytest.mark.parametrize("method", video.METHODS)
def test_the_setting_rate_takes_precedence(method: str) -> None:
    pruning = Pruning(Settings(method, rate=0.75))
    assert pruning.retained_tokens(20, 6, 0.1) == 30
    assert int(pruning.retention_mask(film(), (FRAMES, ROWS, COLUMNS), 1, 0.1).sum()) == 30
    assert pruning.retention_mask(film(), (FRAMES, ROWS, COLUMNS), 1, 0.1).equal(
        Pruning(Settings(method)).retention_mask(film(), (FRAMES, ROWS, COLUMNS), 1, 0.75)
    )


@pytest.mark.parametrize("method", video.METHODS)
@pytest.mark.parametrize("fill", [0.0, torch.nan, torch.inf])
def test_counts_hold_for_any_features(method: str, fill: float) -> None:
    features = torch.full((N, 16), fill)
    assert int(Pruning(Settings(method)).retention_mask(features, (FRAMES, ROWS, COLUMNS), 1, 0.7).sum()) == 36


def test_nothing_is_pruned_at_rate_zero_or_of_an_empty_video() -> None:
    pruning = Pruning(Settings("mmr"))
    assert pruning.retention_mask(film(), (FRAMES, ROWS, COLUMNS), 1, 0).all()
    assert pruning.retained_tokens(0, 6, 0.5) == pruning.retained_tokens(20, 0, 0.5) == 0
    assert pruning.retention_mask(torch.empty(0, 16), (0, ROWS, COLUMNS), 1, 0.5).shape == (0,)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda p: p.retained_tokens(20, 6, 1.0), ValueError, "q=1.0 must be at least 0 and less than 1"),
        (lambda p: p.retained_tokens(20.0, 6, 0.5), TypeError, "tokens_per_frame must be a host int"),
        (lambda p: p.retained_tokens(20, -6, 0.5), ValueError, "num_frames=-6 must be at least 0"),
        (lambda p: p.retention_mask(film(), (6, 4, 4), 1, 0.5), ValueError, r"video_embeds must be \[96, D\] for"),
        (lambda p: p.retention_mask(film(), (6, 4, 5), 0, 0.5), ValueError, "spatial_merge_size=0 must be at least 1"),
        (lambda p: p.retention_mask(film().long(), (6, 4, 5), 1, 0.5), TypeError, "video_embeds must be"),
    ],
)
def test_arguments_that_do_not_fit(call: Callable[[Pruning], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(Pruning(Settings("evs")))


def test_counters_and_the_line_about_the_first_video(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "_counters", {"videos": 0, "tokens": 0, "kept": 0})
    lines: list[str] = []
    pruning = Pruning(Settings("topk"), note=lines.append)
    for _ in range(2):
        pruning.retention_mask(film(), (FRAMES, ROWS, COLUMNS), 1, 0.5)
    assert video.counters() == {"videos": 2, "tokens": 240, "kept": 120}
    assert lines == ["flashprune: first video pruned, 120 tokens to 60, on cpu"]


def test_swap_reaches_every_module_that_holds_the_object(monkeypatch: pytest.MonkeyPatch) -> None:
    old, new, other = object(), object(), object()
    modules = [ModuleType("one"), ModuleType("two")]
    for module in modules:
        vars(module).update(held=old, other=other)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    assert video.swap(old, new) == 2
    assert all(module.held is new and module.other is other for module in modules)  # type: ignore[attr-defined]


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_an_engines_adapter_imports_no_engine(engine: str) -> None:
    """Without a method `register` returns at once, so it runs here, where no engine is installed."""
    program = f"from flashprune.integrations.{engine} import register; register(); import sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], env={}, capture_output=True, text=True, timeout=120)
    loaded = done.stdout.split()
    assert f"flashprune.integrations.{engine}" in loaded and engine not in loaded, done.stderr


@pytest.mark.parametrize("found", ["1.2.3", "1.2.3+cu129", "1.2.3.post1"])
def test_builds_of_the_version_checked_are_accepted(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PREFIX + "METHOD", "evs")
    monkeypatch.setattr(versions, "version", lambda package: found)
    assert video.start("engine", "1.2.3") == Settings("evs")


@pytest.mark.parametrize("found", ["1.2.4", "1.2", "1.2.30", "1.2.3rc1", "1.2.3.dev4+g00"])
def test_other_versions_are_refused(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PREFIX + "METHOD", "evs")
    monkeypatch.setattr(versions, "version", lambda package: found)
    with pytest.raises(SystemExit, match=re.escape(f"engine 1.2.3, found {found}: set FLASHPRUNE_UNCHECKED_ENGINE=1")):
        video.start("engine", "1.2.3")
    monkeypatch.setenv("FLASHPRUNE_UNCHECKED_ENGINE", "1")
    assert video.start("engine", "1.2.3") == Settings("evs")


@pytest.fixture
def engine_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package `engine` that a distribution of another name installed, and that fails to be imported."""
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "__init__.py").write_text("raise AssertionError('imported')\n")
    facts = tmp_path / "engine_cpu-1.2.3.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: engine-cpu\nVersion: 1.2.3\n")
    (facts / "top_level.txt").write_text("engine\n")
    monkeypatch.syspath_prepend(tmp_path)


def test_an_engine_of_another_distribution_is_found(engine_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PREFIX + "METHOD", "evs")
    assert versions.found("engine") == "1.2.3"
    assert video.start("engine", "1.2.3") == Settings("evs")
    with pytest.raises(SystemExit, match=re.escape("engine 1.2.4, found 1.2.3")):
        video.start("engine", "1.2.4")


def test_a_loaded_engine_tells_its_own_version(engine_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = ModuleType("engine")
    monkeypatch.setitem(sys.modules, "engine", loaded)
    assert versions.found("engine") == "1.2.3"
    loaded.__version__ = "1.2.5+cpu"  # type: ignore[attr-defined]
    assert versions.found("engine") == "1.2.5+cpu"


def test_an_engine_of_no_known_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PREFIX + "METHOD", "evs")
    with pytest.raises(SystemExit, match=r"^flashprune: checked with no_engine 1\.2\.3, found none"):
        video.start("no_engine", "1.2.3")


@pytest.mark.parametrize(("group", "engine"), [("vllm.general_plugins", "vllm"), ("sglang.srt.plugins", "sglang")])
def test_entry_points_are_outside_the_package(group: str, engine: str) -> None:
    assert entry_points(group=group)["flashprune"].load() is getattr(flashprune_plugins, engine)


def start_plugin(program: str, **given: str) -> subprocess.CompletedProcess[str]:
    """As an engine does that logs exceptions of its plugins and goes on."""
    started = f"try:\n {program}\nexcept Exception as error:\n print('logged', error)\nprint('started')"
    plain = {name: value for name, value in os.environ.items() if not name.startswith("FLASHPRUNE_")}
    return subprocess.run(
        [sys.executable, "-c", started], env=plain | given, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_a_package_that_cannot_be_imported_stops_the_engine(engine: str) -> None:
    program = f"import sys; sys.modules['flashprune'] = None; import flashprune_plugins; flashprune_plugins.{engine}()"
    done = start_plugin(program, FLASHPRUNE_VIDEO_METHOD="evs")
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"flashprune: cannot prune in {engine}: ModuleNotFoundError: ") and "flashprune" in line


@pytest.mark.parametrize("given", [{}, {"FLASHPRUNE_VIDEO_METHOD": ""}, {"FLASHPRUNE_BACKEND": "cpu"}])
def test_nothing_is_imported_without_a_setting(given: dict[str, str]) -> None:
    program = "import sys, flashprune_plugins as plugins; plugins.vllm(); plugins.sglang(); print(*sys.modules)"
    loaded = start_plugin(program, **given).stdout.split()
    assert "flashprune_plugins" in loaded and loaded[-1] == "started"
    assert not {"flashprune", "torch"} & set(loaded)


@pytest.mark.parametrize("error", [RuntimeError("two\nlines"), ImportError("no module"), AttributeError("evs")])
def test_any_failure_of_a_plugin_is_one_line_that_ends_the_process(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def register() -> None:
        raise error

    monkeypatch.setenv(PREFIX + "METHOD", "evs")
    monkeypatch.setattr(vllm_plugin, "register", register)
    with pytest.raises(SystemExit) as raised:
        flashprune_plugins.vllm()
    reason = " ".join(str(error).split())
    assert str(raised.value) == f"flashprune: cannot prune in vllm: {type(error).__name__}: {reason}"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("importance", video.IMPORTANCE)
@pytest.mark.parametrize("method", video.METHODS)
def test_nothing_waits_for_the_gpu(method: str, importance: str) -> None:
    pruning, thw, features = Pruning(Settings(method, importance)), (FRAMES, ROWS, COLUMNS), film().cuda()
    expected = pruning.retention_mask(features, thw, 1, 0.6)  # compiles the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        mask = pruning.retention_mask(features, thw, 1, 0.6)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert mask.is_cuda and torch.equal(mask, expected)
    assert torch.equal(mask.cpu(), pruning.retention_mask(film(), thw, 1, 0.6))
