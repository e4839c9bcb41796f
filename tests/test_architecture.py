"""Imports point one way, and parts that must be quick to load or blind to others stay so."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dropkey"
# What each part may import of the package, besides itself.
MAY_IMPORT = {
    "errors": set(),
    "invocation": set(),
    "__main__": {"__version__", "errors", "invocation"},
    "train": {"commands"},
    "seeds": set(),
    "schedules": set(),
    "metrics": set(),
    "bernoulli": set(),
    "regularizers": {"bernoulli"},
    "plotting": {"errors", "metrics"},
    "page": set(),
    "shapes": {"errors"},
    "records": {"errors", "metrics", "shapes"},
    "config": {"errors", "invocation", "records"},
    "code_version": {"config"},
    "cli": {"config", "errors"},
    "data": {"config", "errors", "seeds"},
    "detection": {"config", "data", "errors", "seeds"},
    "mesh": {"config", "data", "errors", "seeds"},
    "datasets": {"config", "data", "detection", "errors", "mesh", "seeds"},
    "models": {"config", "errors", "mesh"},
    "operator": {"bernoulli", "regularizers"},
    "patching": {"bernoulli", "operator", "regularizers", "schedules", "seeds"},
    "tasks": {"config", "data", "datasets", "detection", "errors", "mesh", "metrics", "models", "records", "shapes"},
    "engine": {"config", "errors", "metrics", "records", "seeds"},
    "weights": {"engine", "errors", "origin"},
    "provenance": {"__version__", "engine", "records"},
    "build": {"config", "engine", "errors", "operator", "patching", "regularizers", "schedules", "seeds", "tasks"},
    "session": {
        *("build", "code_version", "config", "engine", "errors", "origin", "plotting", "provenance"),
        *("records", "tasks", "weights"),
    },
    "evaluation": {
        *("build", "code_version", "config", "datasets", "engine", "errors", "metrics", "origin", "patching"),
        *("provenance", "records", "seeds", "session", "tasks", "weights"),
    },
    "loading": {
        *("build", "config", "engine", "errors", "origin", "patching", "records", "seeds", "tasks", "weights"),
    },
    "exporting": {"config", "errors", "loading", "records", "tasks"},
    "analysis": {
        *("build", "code_version", "config", "engine", "errors", "metrics", "page", "patching", "plotting"),
        *("provenance", "records", "regularizers", "schedules", "tasks", "weights"),
    },
    "api": {"commands", "config", "loading", "records"},
    "multirun": {"config", "run_table"},
    "origin": {"config", "errors", "records"},
    "run_table": {"config", "errors", "metrics", "records"},
    "commands": {
        *("analysis", "cli", "config", "engine", "errors", "evaluation", "exporting", "invocation", "loading"),
        *("metrics", "multirun", "origin", "records", "reproduction", "run_table", "session", "tasks"),
    },
    "reproduction": {
        *("code_version", "config", "errors", "invocation", "metrics", "page", "plotting", "records"),
        *("shapes", "tasks"),
    },
}
FILES = [file for file in PACKAGE.rglob("*.py") if file != PACKAGE / "__init__.py"]


def part(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(file: Path) -> set[str]:
    """Parts of the package that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("dropkey.")}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_point_one_way(file):
    assert imported(file) - {part(file)} <= MAY_IMPORT[part(file)]


@pytest.mark.parametrize("file", sorted((PACKAGE / "engine").glob("*.py")), ids=lambda file: file.name)
def test_the_engine_is_blind_to_methods_models_and_data_sets(file):
    code = re.sub(r'""".*?"""|#.*', "", file.read_text(), flags=re.S)
    words = re.sub(r"(from|import) dropkey\S*", "", code).lower()
    assert not re.search(r"dropkey|regulariz|t2t|volo|cifar|imagenet|digits", words)


@pytest.mark.parametrize("module", ["dropkey", "dropkey.config.compose", "dropkey.code_version", "dropkey.records"])
def test_what_runs_before_the_checks_imports_no_torch(module):
    program = f"import sys, {module}; print([m for m in ('torch', 'timm', 'wandb', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_files_and_functions_stay_short(file):
    text = file.read_text()
    assert len(text.splitlines()) <= 320
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and node.name not in LONG:
            assert node.end_lineno - node.lineno < 60, node.name


LONG = {"train": "a run from beginning to end is one page, in order"}


def test_long_functions_are_still_there():
    text = "".join(file.read_text() for file in FILES)
    assert all(f"def {name}(" in text for name in LONG)


def test_the_path_from_command_to_optimizer_step_is_short(tmp_path):
    """Six own frames at most: what a reader must hold in mind."""
    program = f"""
import os, sys, traceback, torch
sys.argv = ["train.py", "output={tmp_path}", "trainer.max_steps=1", "logger=none"]
original = torch.optim.AdamW.step

def step(self, *args, **kwargs):
    own = [f for f in traceback.extract_stack() if os.path.abspath(f.filename).startswith({str(ROOT)!r} + "/")]
    own = [frame for frame in own if ".venv" not in frame.filename and "<" not in frame.filename]
    print("FRAMES", *(f"{{frame.filename.rsplit('/')[-1]}}:{{frame.name}}" for frame in own))
    return original(self, *args, **kwargs)

torch.optim.AdamW.step = step
import runpy
runpy.run_path("train.py", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    frames = next(line for line in done.stdout.splitlines() if line.startswith("FRAMES")).split()[1:]
    functions = [frame for frame in frames if not frame.endswith("<module>")]
    assert len(functions) <= 6, frames
    assert len({frame.split(":")[0] for frame in frames}) <= 8, frames
