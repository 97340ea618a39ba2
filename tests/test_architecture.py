"""Imports run one way: scripts -> qlora -> glm_models -> each model -> glm_shared -> glm_kernels.

docs/architecture.md says how they run within qlora.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

MODELS = ("chatglm", "chatglm2")  # which do not import each other
PACKAGES = ("glm_kernels", "glm_shared", *MODELS, "glm_models", "qlora")  # from the lowest to the highest
SHARED = {"data", "hub", "layers"}  # folders of qlora that the others use
SCRIPTS = [*ROOT.glob("*.py"), *ROOT.glob("scripts/*.py")]
FILES = [path for package in PACKAGES for path in ROOT.glob(f"{package}/**/*.py")] + SCRIPTS
QLORA_FILES = [path for path in FILES if path.is_relative_to(ROOT / "qlora")]
TORCH_FREE = ("qlora/arguments.py", "qlora/command_line.py", "qlora/errors.py", "qlora/units.py", "qlora/__init__.py")
PROJECT_MODULES = {*PACKAGES, "scripts", *(path.stem for path in SCRIPTS)}


def imported(path: Path) -> list[str]:
    """The modules that a file imports, at the top or in functions; `from a import b` counts as a.b."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.relative_to(ROOT)} has a relative import"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def own_imports(path: Path) -> list[list[str]]:
    """The imported modules of this project, as lists of names."""
    return [name.split(".") for name in imported(path) if name.split(".")[0] in PROJECT_MODULES]


def parameters(paths: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", paths, ids=[str(path.relative_to(ROOT)) for path in paths])


@parameters(FILES)
def test_imports_run_one_way(path):
    package = path.relative_to(ROOT).parts[0]
    allowed = set(PACKAGES[: PACKAGES.index(package) + 1] if package in PACKAGES else PACKAGES)
    if package in MODELS:
        allowed -= {*MODELS} - {package}
    wrong = [".".join(name) for name in own_imports(path) if name[0] not in allowed]
    assert not wrong, f"{path.relative_to(ROOT)} imports {', '.join(wrong)}"


@parameters([*QLORA_FILES, ROOT / "train_qlora.py", ROOT / "inference_qlora.py"])
def test_training_and_inference_know_no_model_by_name(path):
    named = [".".join(name) for name in own_imports(path) if name[0] in MODELS]
    assert not named, f"{path.relative_to(ROOT)} imports {', '.join(named)}: a model describes itself, see glm_shared/"


@parameters(QLORA_FILES)
def test_folders_of_qlora_use_what_is_shared_and_not_each_other(path):
    folder = path.relative_to(ROOT / "qlora").parts[0] if path.parent != ROOT / "qlora" else None
    folders = {path.name for path in (ROOT / "qlora").iterdir() if (path / "__init__.py").exists()}
    used = {name[1] for name in own_imports(path) if name[0] == "qlora"} & folders
    allowed = {folder} if folder in SHARED else {folder} | SHARED if folder else set()
    assert used <= allowed, f"{path.relative_to(ROOT)} imports from {', '.join(sorted(used - allowed))}"


def test_no_circular_imports():
    modules = {path.relative_to(ROOT).with_suffix("").parts: path for path in FILES}
    modules = {".".join(parts[:-1] if parts[-1] == "__init__" else parts): path for parts, path in modules.items()}

    def dependencies(name: str) -> set[str]:
        candidates = {".".join(parts[:end]) for parts in own_imports(modules[name]) for end in (None, -1)}
        return {module for module in candidates if module in modules} - {name}

    visited, path = set(), []

    def visit(name: str):
        assert name not in path, f"a circle of imports: {' -> '.join([*path[path.index(name) :], name])}"
        if name not in visited:
            path.append(name)
            for other in sorted(dependencies(name)):
                visit(other)
            visited.add(path.pop())

    for name in sorted(modules):
        visit(name)


@parameters([ROOT / name for name in TORCH_FREE])
def test_command_line_needs_only_the_standard_library(path):
    roots = {name.split(".")[0] for name in imported(path)} - {"qlora"}
    assert roots <= sys.stdlib_module_names


@pytest.mark.parametrize(
    "script",
    [
        "train_qlora.py",
        "inference_qlora.py",
        *(f"scripts/{n}.py" for n in ("evaluate_qlora", "merge_lora", "quantize_checkpoint")),
    ],
)
def test_flags_are_read_before_torch_is_imported(script):
    code = f"""
import runpy, sys
sys.argv = [{script!r}, "--no_such_flag"]
try:
    runpy.run_path({str(ROOT / script)!r}, run_name="__main__")
except SystemExit as error:
    assert "unknown argument --no_such_flag" in str(error.code), error.code
    heavy = {{"torch", "transformers", "peft", "bitsandbytes", "datasets"}} & set(sys.modules)
    assert not heavy, heavy
else:
    raise AssertionError("the flag was accepted")
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr


def test_qlora_has_few_files_of_its_own():
    assert len(list((ROOT / "qlora").glob("*.py"))) <= 10


def test_no_script_changes_the_path():
    assert not [path.name for path in FILES if "sys.path.insert" in path.read_text(encoding="utf-8")]
