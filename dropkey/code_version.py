"""Which code a run depends on, in parts: runs are comparable while no part that they share differs.

A part's digest is taken over its source without comments, docstrings and formatting. What a run does not use is not
among its parts: another regularizer, model, data set or task leaves it valid.
"""

import ast
import hashlib
import importlib.metadata
import importlib.util
from functools import lru_cache
from pathlib import Path

from dropkey.config.schema import TrainConfig

PACKAGE = Path(__file__).parent
ENGINE = (
    "session.py",
    "weights.py",
    "seeds.py",
    "engine/trainer.py",
    "engine/state.py",
    "engine/optim.py",
    "engine/evaluate.py",
)
ENGINE += ("engine/distributed.py",)
TRITON = tuple(f"operator/{name}.py" for name in ("kernels", "kernels_backward", "kernel_options", "tiling"))
TRITON += ("operator/triton_ops.py",)
FILES = {
    "engine": ENGINE,
    "data": ("data/*.py",),
    "detection": ("detection/*.py",),
    "mesh": ("mesh/*.py",),
    "patching": ("patching/*.py", "schedules.py"),
    "operator": tuple(f"operator/{name}.py" for name in ("api", "cpu", "reference", "sdpa")),
    "operator/triton": TRITON,
}


def code_of(cfg: TrainConfig, cuda: bool = False) -> dict[str, str]:
    """Part -> digest, for everything that a run of `cfg` uses; `cuda` adds the Triton kernels."""
    own_model = next((file.stem for file in PACKAGE.glob("models/*.py") if cfg.model.name.startswith(file.stem)), None)
    parts = ["engine", "data", f"dataset/{cfg.data.name}", f"task/{cfg.task.name}"]
    parts += [f"model/{own_model}" if own_model else "timm"]
    parts += ["detection"] if cfg.task.name in ("detection", "interaction") else []
    parts += ["task/detection", "model/detr"] if cfg.task.name == "interaction" else []  # which it builds on
    parts += ["dataset/digit_scenes"] if cfg.data.name == "digit_pairs" else []
    parts += ["mesh"] if cfg.task.name == "mesh" else []
    if cfg.regularizer.name != "none":
        parts += ["patching", "operator", *(["operator/triton"] if cuda else []), f"regularizer/{cfg.regularizer.name}"]
    return {part: part_digest(part) for part in parts}


def changed_parts(code: dict[str, str]) -> list[str]:
    """The parts of a finished run whose code is another one today."""
    return [part for part, digest in code.items() if part_digest(part) != digest]


@lru_cache(maxsize=None)
def part_digest(part: str) -> str:
    """Ten hexadecimal digits; "missing" for a part that does not exist (any more)."""
    if part == "timm":
        return importlib.metadata.version("timm")
    group, _, name = part.partition("/")
    if part in FILES:
        files = sorted(file for pattern in FILES[part] for file in PACKAGE.glob(pattern))
        sources = [normalised(ast.parse(file.read_text(encoding="utf-8"))) for file in files]
    elif group == "regularizer":
        sources = [regularizer_source(name), normalised(ast.parse((PACKAGE / "bernoulli.py").read_text()))]
    else:
        spec = importlib.util.find_spec(name.partition(":")[0]) if ":" in name else None  # the user's own
        file = Path(spec.origin) if spec else PACKAGE / f"{group}s" / f"{name}.py"
        sources = [normalised(ast.parse(file.read_text(encoding="utf-8")))] if file.exists() else []
    return hashlib.sha256("\0".join(sources).encode()).hexdigest()[:10] if any(sources) else "missing"


def normalised(tree: ast.AST) -> str:
    """Source without docstrings and comments, in one formatting."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            node.body = body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def regularizer_source(name: str) -> str:
    """The definitions in regularizers.py that one regularizer reaches; other entries of REGULARIZERS do not count."""
    tree = ast.parse((PACKAGE / "regularizers.py").read_text(encoding="utf-8"))
    definitions, entries = {}, {}
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            definitions[node.name] = node
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            definitions[node.targets[0].id] = node
    registry = definitions.pop("REGULARIZERS").value
    for key, value in zip(registry.keys, registry.values, strict=True):
        entries[key.value] = value
    if name not in entries:
        return ""  # added by the user's own code
    reached = {key: definitions[key] for key in ("seeded_mask", "compute_mask")}  # through which all masks are drawn
    todo = [entries[name], *reached.values()]
    while todo:
        for node in ast.walk(todo.pop()):
            if isinstance(node, ast.Name) and node.id in definitions and node.id not in reached:
                reached[node.id] = definitions[node.id]
                todo.append(definitions[node.id])
    return "\n".join([ast.unparse(entries[name]), *(normalised(reached[key]) for key in sorted(reached))])
