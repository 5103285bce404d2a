"""The shape of the house: imports go downwards, and the operator stands on torch and numpy alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "sslsr_diffusion"
LAYERS = [
    {
        *("types", "errors", "seeding", "config", "mistakes", "tables", "files", "unpickle", "hub", "weights", "devices"),
        *("shipped_model", "partners", "listing", "tensors", "imresize", "metadata", "images", "ops"),
    },
    {"data", "models", "losses", "evaluation"},
    {"inference"},
    {"tasks"},
    {"training"},
    {"runs"},
    {"page", "checkup"},
    {"cli"},
]
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}
GROUND = LAYERS[0] - {"images", "ops"}  # what everything, their own layer included, may use
ONLY_IN = {
    "accelerate": {"training"},
    "diffusers": {"models", "inference", "training"},  # training: its schedules and its moving average
    "spandrel": {"models"},
    "cupy": {"ops", "checkup"},
    "numba": {"ops"},
    "huggingface_hub": {"hub"},
}
FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def imports(path: Path) -> set[str]:
    """Modules imported anywhere in a file, but for type checkers alone."""
    tree, found = ast.parse(path.read_text()), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def part_of(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").parts[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_downwards(path):
    part = part_of(path)
    assert part in LEVEL, f"{part} has no layer"
    for module in imports(path):
        top, *rest = module.split(".")
        if top == "sslsr_diffusion" and rest and rest[0] in LEVEL and rest[0] != part:
            below = LEVEL[rest[0]] < LEVEL[part] or (LEVEL[part] == 0 and rest[0] in GROUND)
            assert below, f"{part} imports {module}, which is not below it"
        assert top not in ONLY_IN or part in ONLY_IN[top] | {"cli"}, f"{part} must not know {top}"


def module_of(path: Path) -> str:
    return ".".join(("sslsr_diffusion", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")


def test_no_file_imports_itself_by_way_of_others():
    """A circle of files, wherever in them the imports stand; what a table names by text is no import."""
    files = {module_of(path): path for path in FILES}
    arrows = {
        module: {next((name for name in (found, found.rpartition(".")[0]) if name in files), module) for found in imports(path)} - {module}
        for module, path in files.items()
    }
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail[trail.index(module) :], module))
        if module not in done:
            for below in arrows[module]:
                visit(below, (*trail, module))
            done.add(module)

    for module in files:
        visit(module, ())


@pytest.mark.parametrize(
    "path", [path for path in FILES if part_of(path) != "cli" and path.name != "__main__.py"], ids=lambda path: str(path.relative_to(ROOT))
)
def test_only_the_cli_prints(path):
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    assert not [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]


def test_ops_import_torch_and_numpy_alone():
    allowed = {*sys.stdlib_module_names, "torch", "numpy", "numba", "llvmlite", "cupy", "sslsr_diffusion"}
    for path in FILES:
        if part_of(path) == "ops":
            assert {module.split(".")[0] for module in imports(path)} <= allowed, path.name


def test_operator_loss_and_mask_stand_alone():
    code = """
import sys
for name in ("diffusers", "transformers", "datasets", "pydantic", "accelerate", "huggingface_hub", "typer", "yaml"):
    sys.modules[name] = None
import sslsr_diffusion.checkup.everything, sslsr_diffusion.checkup.operator, sslsr_diffusion.checkup.own_tests
from sslsr_diffusion import SelfSimilarityLoss, laplacian_edge_mask, self_similarity_graph
import torch
assert not {"numba", "cupy"} & set(sys.modules), "imported before first use"
image = torch.rand(1, 3, 16, 16)
mask = laplacian_edge_mask(image)
self_similarity_graph(image, mask, backend="torch")
SelfSimilarityLoss(backend="torch")(image.requires_grad_(), image.detach(), mask).backward()
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_kernels_folder_holds_no_python():
    """A kernels/__init__.py would shadow the package of that name which diffusers imports."""
    assert not list((ROOT.parent / "kernels").rglob("*.py"))


def test_files_and_functions_are_read_in_one_sitting():
    """At most 350 lines a file and 70 a function, signature and docstring included."""
    for path in sorted(ROOT.rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        assert source.count("\n") <= 350, path
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno - node.lineno < 70, f"{path}: {node.name}"


def test_pictures_are_read_and_written_in_few_lines():
    """At most 600 in all: what lies beside the pixels belongs to `metadata/`."""
    assert sum(path.read_text(encoding="utf-8").count("\n") for path in (ROOT / "images").rglob("*.py")) <= 600
