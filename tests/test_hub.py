"""The kernel for the Hugging Face Hub: its layout is complete, and it runs when loaded as the Hub's loader loads it."""

import ast
import importlib
import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
import torch

import flashprune as fp

pytest.importorskip("triton")

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("hub") / "project"
    subprocess.run([sys.executable, ROOT / "hub" / "assemble.py", target], check=True)
    return target


def load(package: Path, name: str) -> ModuleType:
    """From a file, under a name of its own: the package is not on the path, and several may be loaded."""
    spec = importlib.util.spec_from_file_location(name, package / "__init__.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_layout_is_what_build_toml_says(project: Path) -> None:
    build = tomllib.loads((project / "build.toml").read_text())
    assert build["general"]["backends"] == ["cuda"] and build["torch-noarch"] == {}
    package = project / "torch-ext" / build["general"]["name"].replace("-", "_")
    assert (package / "__init__.py").is_file() and (project / "flake.nix").is_file()
    ours = {path.name for path in (ROOT / "triton_kernels").glob("*.py")}
    assert {path.name for path in (package / "triton_kernels").iterdir()} == ours
    assert not any(path.is_symlink() for path in project.rglob("*"))


def test_it_imports_only_itself_torch_triton_and_the_standard_library(project: Path) -> None:
    for path in (project / "torch-ext").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            else:
                continue
            for name in names:
                top = name.split(".")[0]
                assert top in ("torch", "triton") or top in sys.stdlib_module_names, f"{path.name} imports {name}"


@pytest.mark.parametrize("op", ["topk", "mmr", "maxmin", "dpp", "evs", "vidcom2"])
def test_two_copies_select_as_the_package_does(project: Path, op: str, device: torch.device) -> None:
    kernels = [load(project / "torch-ext" / "flashprune", f"_flashprune_{copy}") for copy in ("one", "two")]
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(48, 32, generator=generator).to(device)
    scores = torch.rand(48, generator=generator).to(device)
    inputs = {
        "topk": (scores, 12),
        "mmr": (features, scores, 12),
        "maxmin": (features, 12),
        "dpp": (features, scores, 12),
    }
    expected = {
        "topk": lambda: fp.reference.topk_select(scores, 12),
        "mmr": lambda: fp.reference.mmr_select(features, scores, 12),
        "maxmin": lambda: fp.reference.maxmin_select(features, 12),
        "dpp": lambda: fp.reference.dpp_select(features, scores, 12),
        "evs": lambda: fp.reference.evs_select(features, (4, 3, 4), 1, q=0.5),
        "vidcom2": lambda: fp.reference.vidcom2_select(features, (4, 3, 4), 1, q=0.5),
    }
    arguments = inputs.get(op, (features, 4, 24))
    for kernel in kernels:
        assert getattr(kernel, f"{op}_select")(*arguments).tolist() == expected[op]().tolist()
    one, two = (sys.modules[f"{kernel.__name__}.triton_kernels.{op}"] for kernel in kernels)
    assert one is not two and one.__file__ == two.__file__


def test_it_launches_on_the_device_of_its_tensors(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = load(project / "torch-ext" / "flashprune", "_flashprune_guarded")
    topk = importlib.import_module(f"{kernel.__name__}.triton_kernels.topk")
    guarded: list[torch.Tensor] = []
    within: list[torch.Tensor] = []

    @contextmanager
    def device_of(tensor: torch.Tensor) -> Iterator[None]:
        guarded.append(tensor)
        yield
        guarded.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(topk, "topk_select", lambda scores, *_: within.append(guarded[-1]))
    scores = torch.zeros(4)
    kernel.topk_select(scores, 2)
    assert within[0] is scores and not guarded


@pytest.mark.parametrize(
    ("op", "arguments", "message"),
    [
        ("topk", (torch.zeros(4), 5), "k=5 must lie between 0 and N=4"),
        ("maxmin", (torch.zeros(4), 2), r"expected float32, float16 or bfloat16 \[N, D\], got torch.float32 \[4\]"),
        ("maxmin", (torch.zeros(4, 2).double(), 2), "got torch.float64"),
        ("mmr", (torch.zeros(4, 2), torch.zeros(3), 2), r"importance must be \[4\]"),
        ("dpp", (torch.zeros(4, 2), torch.zeros(3), 2), r"relevance must be \[4\]"),
        ("evs", (torch.zeros(6, 2), 4, 3), "frames=4 must divide N=6"),
        ("evs", (torch.zeros(6, 2), 2, 2), "k=2 is less than the 3 tokens of the first frame"),
        ("vidcom2", (torch.zeros(6, 2), 3, 2), "k=2 is less than one token for each of frames=3"),
    ],
)
def test_arguments_that_do_not_fit(project: Path, op: str, arguments: tuple[object, ...], message: str) -> None:
    kernel = load(project / "torch-ext" / "flashprune", "_flashprune_checked")
    with pytest.raises(ValueError, match=message):
        getattr(kernel, f"{op}_select")(*arguments)


def test_a_folder_in_use_is_left_alone(project: Path) -> None:
    done = subprocess.run([sys.executable, ROOT / "hub" / "assemble.py", project], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == f"assemble.py: {project} is not empty\n"


def test_the_hubs_own_loader_takes_it(project: Path, tmp_path: Path, device: torch.device) -> None:
    """As published: the package is the variant's folder, with the metadata that kernel-builder writes."""
    importer = pytest.importorskip("kernels.importer", reason="no package kernels: CI brings it for this test")
    variant = tmp_path / "build" / "torch-cuda"
    shutil.copytree(project / "torch-ext" / "flashprune", variant)
    metadata = {
        "id": "_flashprune_cuda_0000000",
        "name": "flashprune",
        "version": 0,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": "cuda"},
        "digest": {"algorithm": "sha256", "files": {}},
    }
    (variant / "metadata.json").write_text(json.dumps(metadata))
    kernel = importer._import_from_path(variant, {})
    assert kernel.topk_select(torch.tensor([0.0, 2.0, 1.0], device=device), 2).tolist() == [1, 2]
