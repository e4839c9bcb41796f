"""What pip installs: the wheel works away from the checkout, and each part needs no more than it says."""

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import dropkey
from dropkey import provenance
from dropkey.config.compose import CONFIGS

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIREMENT = re.compile(r"^([\w-]+)(?:\[([\w,]+)\])?")
COMES_WITH = {
    "triton": "torch",
    "PIL": "torchvision",
    "markupsafe": "jinja2",
    "requests": "wandb",
}  # imported, but not asked for by name


def needs(extra: str) -> set[str]:
    """The packages of an extra, with those of the extras that it contains."""
    found = set()
    for requirement in PROJECT["optional-dependencies"][extra]:
        name, extras = REQUIREMENT.match(requirement).groups()
        found |= set().union(*map(needs, extras.split(","))) if extras else {name.lower()}
    return found


# ------------------------------------------------------------------------------------------------------ what is needed

WITHOUT_THE_REST = """
import importlib.metadata, re, sys

def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()

def needed(name, found):  # a package and what it requires itself
    if name not in found:
        found.add(name)
        for requirement in importlib.metadata.requires(name) or ():
            if "extra ==" not in requirement:
                try:
                    needed(normal(re.match(r"[\\w.-]+", requirement)[0]), found)
                except importlib.metadata.PackageNotFoundError:
                    pass
    return found

allowed = needed("torch", set())
known = importlib.metadata.packages_distributions()

class Only:  # a finder of modules that finds none of other packages
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, *args):
        packages = {normal(package) for package in known.get(name.partition(".")[0], ())}
        return self.finder.find_spec(name, *args) if not packages or packages & allowed else None

sys.meta_path[:] = map(Only, sys.meta_path)
"""
USE = """
import warnings
warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # torch's own, and the test is without NumPy
import torch, dropkey
from torch import nn

layer = nn.TransformerEncoderLayer(16, 2, batch_first=True)
report = dropkey.apply(layer, "dropkey", ratio=0.5)
out = layer(torch.randn(2, 5, 16))
out.sum().backward()
q = torch.randn(2, 3, 5, 4, requires_grad=True)
dropkey.attention(q, q, q, ratio=0.5).sum().backward()
dropkey.set_ratio(layer, 0.1)
dropkey.undo(layer)
print("fine", *[name for name in ("numpy", "einops", "timm", "hydra", "omegaconf") if name in sys.modules])
"""


def python(program: str, directory: Path = ROOT) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", program], cwd=directory, capture_output=True, text=True, timeout=300)


def test_apply_and_attention_need_torch_alone():
    done = python(WITHOUT_THE_REST + USE)
    assert (done.stdout, done.stderr) == ("fine\n", "")


@pytest.mark.parametrize("module", ["timm", "einops", "hydra", "numpy"])
def test_the_test_above_would_notice(module):
    assert f"No module named '{module}'" in python(f"{WITHOUT_THE_REST}import {module}").stderr


def test_the_extras_bring_all_that_is_imported():
    distributions = importlib.metadata.packages_distributions()
    extras = set().union(*map(needs, ("sweeps", "export", "parquet", "detection")))
    allowed = extras | {"torch", "dropkey", "pandas"}  # pandas: used where it is there
    for file in (ROOT / "dropkey").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"dropkey"}:
                packages = {COMES_WITH.get(name), name} | {package.lower() for package in distributions.get(name, ())}
                assert packages & allowed, f"{file.name} imports {name}"


def test_the_pinned_requirements_are_those_of_the_extras():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pinned = {line.partition("==")[0].lower() for line in lines if line and not line.startswith("#")}
    assert pinned == needs("dev") | {"torch"}


# ------------------------------------------------------------------------------------------------------------ the wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built as pip builds it, but by the backend that is installed here, so that no network is needed."""
    place = tmp_path_factory.mktemp("wheel")
    done = python(f"import hatchling.build; hatchling.build.build_wheel({str(place)!r})")
    assert done.returncode == 0, done.stderr
    (built,) = place.iterdir()
    return built


def test_the_wheel_has_the_version_of_the_package(wheel):
    assert wheel.name == f"dropkey-{dropkey.__version__}-py3-none-any.whl"


def test_the_wheel_holds_the_package_its_configs_and_the_plan_of_the_study_and_no_more(wheel):
    command = "git ls-files --cached --others --exclude-standard dropkey configs"  # with files not yet committed
    listed = subprocess.run(command.split(), cwd=ROOT, capture_output=True, text=True).stdout
    wanted = {re.sub("^configs/", "dropkey/configs/", line) for line in listed.splitlines()}
    wanted.add("dropkey/docs/protocol.md")
    found = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in found if ".dist-info/" not in name} == wanted
    assert {"dropkey/py.typed", "dropkey/configs/train.yaml"} <= wanted
    assert any(name.endswith("licenses/LICENSE") for name in found)


def test_settings_of_one_machine_do_not_travel(tmp_path):
    """A wheel of a copy of the checkout that has such a file."""
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore", "dropkey/__init__.py", "docs/protocol.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    for name in ("configs/local/default.yaml", "configs/train.yaml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("output: /scratch\n")
    python("import hatchling.build; hatchling.build.build_wheel('dist')", tmp_path)
    (built,) = (tmp_path / "dist").iterdir()
    names = [name for name in zipfile.ZipFile(built).namelist() if "configs" in name]
    assert names == ["dropkey/configs/train.yaml"]


# ------------------------------------------------------------------------------------------------------- its commands


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A function that runs a program of an environment in which the wheel is installed, in an empty directory. The
    environment sees the packages of this one, and nothing of the checkout."""
    place, empty = tmp_path_factory.mktemp("environment"), tmp_path_factory.mktemp("empty")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place], check=True)
    packages = next(path for path in sys.path if path.endswith("site-packages"))
    (next(place.glob("lib/python*/site-packages")) / "packages.pth").write_text(packages)
    pip = [sys.executable, "-m", "pip", "--python", place / "bin" / "python", "install", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--quiet", "--disable-pip-version-check", wheel], check=True)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}

    def run(program: str, *words: str) -> list[str]:
        command = [place / "bin" / program, *words]
        done = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    run.directory = empty
    return run


def test_the_installed_package_is_not_the_checkout(installed):
    (place,) = installed("python", "-c", "import dropkey; print(dropkey.__path__[0])")
    assert not Path(place).is_relative_to(ROOT)


def test_an_installed_dropkey_trains_evaluates_and_plans_in_an_empty_directory(installed):
    words = ["train", "model.depth=1", "trainer.max_steps=2", "logger=none", "trainer.device=cpu"]
    trained = installed("dropkey", *words)
    assert trained[-3].startswith("test   top-1")
    (run,) = (installed.directory / "runs").iterdir()
    command = re.match(r"next   dropkey (eval run=\S+)", trained[-1])[1]  # what it says goes on
    assert installed("dropkey", *command.split())[-1] == f"result runs/{run.name}/eval-test.json"
    planned = installed("dropkey", "reproduce", "plan", "table=schedule", "scale=smoke")
    assert "DropKey" in "".join(planned)
    assert {path.name for path in installed.directory.iterdir()} == {"runs"}


def test_jobs_of_an_installed_table_start_the_installed_program(installed):
    program = (
        "from dropkey.reproduction import jobs, slots, tables\n"
        "job = next(iter(jobs.jobs_of(tables.load('schedule', 'smoke'), 'runs').values()))\n"
        "for gpus in ((), ('0', '1')): print(*slots.Slot(gpus, 1).command(job)[1:8])"
    )
    single, several = installed("python", "-c", program)
    assert single.startswith("-P -m dropkey train ")
    assert several.startswith("-P -m torch.distributed.run --standalone --nproc-per-node=2 -m dropkey")


@pytest.mark.parametrize("tracked", [True, False])
def test_a_result_names_the_commit_of_this_code_and_not_of_the_project_it_is_installed_in(
    tracked, tmp_path, monkeypatch
):
    def git(*words: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        return subprocess.run(
            ["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout

    (tmp_path / "provenance.py").touch()
    (tmp_path / "other.py").touch()
    git("init")
    git("add", "provenance.py" if tracked else "other.py")
    git("commit", "-m", "first")
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "provenance.py"))
    assert provenance.git_commit() == (git("rev-parse", "HEAD").strip() if tracked else None)


# -------------------------------------------------------------------------------------------------- licence, citation


def test_the_citation_names_this_software_and_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["type"] == "software" and "DropKey" in citation["title"]
    (paper,) = citation["references"]
    assert (paper["title"], paper["year"]) == ("DropKey for Vision Transformer", 2023)
    assert paper["identifiers"][0]["value"] == "arXiv:2208.02646"


def test_the_licence_is_said_once_and_the_same():
    assert (ROOT / "LICENSE").read_text().startswith("MIT License")
    assert PROJECT["license"] == yaml.safe_load((ROOT / "CITATION.cff").read_text())["license"] == "MIT"


def test_in_a_checkout_the_configs_are_at_the_top():
    assert CONFIGS == ROOT / "configs"
