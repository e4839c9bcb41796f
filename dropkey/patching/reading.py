"""What a module's `forward` calls, read from its bytecode: `apply` has no input to run it on, and source is not always
at hand (notebooks, `exec`)."""

import dis
import inspect
import re
from functools import lru_cache
from types import CodeType, FunctionType, ModuleType
from typing import Optional

from torch import nn

PRODUCTS = {"@", "matmul", "bmm", "mm", "einsum", "baddbmm"}
FUSED = {"scaled_dot_product_attention", "multi_head_attention_forward"}  # these can be regularized
OTHER_FUSED = re.compile("_?(flex_attention$|flash_att|memory_efficient_attention|sage_?attn|varlen_attn)")
CALLED_ATTENTION = re.compile(r"(Attention|Attn|MHSA|MHA)(Layer|Block|Module|Pool\w*|V?\d+d?)*$")  # names of classes
SOFTMAX = {"softmax", "Softmax"}  # nn.Softmax(dim=-1)(logits)
NOT_READ = ("torch.", "einops.")  # known by the names of their functions
DEPTH = 3  # of helper functions that call one another


@lru_cache(maxsize=None)
def calls_in_forward(cls: type) -> tuple[str, ...]:
    """Names that `forward` of a class uses, in the order in which they are called, and "@" for the matrix product.

    Read are also the class's own methods and the functions that it calls, except those of torch and einops, and the
    `forward` of parents as far as super() is called.
    """
    calls = []
    for parent in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        if forward := vars(parent).get("forward"):
            calls += read(forward, cls, DEPTH)
            if "super" not in calls:
                break
    return tuple(calls)


def read(function, cls: type, depth: int) -> list[str]:
    function = inspect.unwrap(function)
    if not isinstance(function, FunctionType):
        return []
    known = dict(function.__globals__)
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            known[name] = cell.cell_contents
        except ValueError:  # it is not filled yet
            continue
    return read_code(function.__code__, known, cls, depth)


def read_code(code: CodeType, known: dict, cls: type, depth: int) -> list[str]:
    """A name is loaded before its arguments are computed. It counts when its call is reached: the next call that begins
    at the same place of the source."""
    calls, waiting, owner = [], [], None
    for step in dis.get_instructions(code):
        start = (step.positions.lineno, step.positions.col_offset)
        if step.opname in ("LOAD_GLOBAL", "LOAD_DEREF", "LOAD_ATTR", "LOAD_METHOD", "IMPORT_FROM"):
            if step.opname in ("LOAD_GLOBAL", "LOAD_DEREF"):
                owner = known.get(step.argval)
            elif isinstance(owner, ModuleType):
                owner = vars(owner).get(step.argval)  # getattr would load what packages load lazily
            else:  # a method of the module itself, or of anything else
                owner = None if hasattr(nn.Module, step.argval) else inspect.getattr_static(cls, step.argval, None)
            waiting.append((start, step.argval, owner))
            continue
        owner = None
        if step.opname.startswith("CALL"):
            index = next((i for i in reversed(range(len(waiting))) if waiting[i][0] == start), None)
            if index is not None:
                _, name, value = waiting.pop(index)
                if isinstance(value, type):  # made here, called when the next call begins at this place
                    waiting.append((start, name, None))
                else:
                    calls += called(name, value, cls, depth)
        elif step.opname == "BINARY_OP" and step.argrepr.startswith("@"):
            calls.append("@")
        elif isinstance(step.argval, CodeType):  # comprehensions and lambdas
            calls += read_code(step.argval, known, cls, depth)
    for _, name, value in waiting:
        calls += called(name, value, cls, depth)
    return calls


def called(name: str, value, cls: type, depth: int) -> list[str]:
    """A name, after the names in the body of the function it stands for, and that function's own name."""
    if not callable(value) or isinstance(value, type):
        return [name]
    function, inner = inspect.unwrap(value), []
    if isinstance(function, FunctionType) and depth and not (function.__module__ or "").startswith(NOT_READ):
        inner = read(function, cls, depth - 1)
    own = getattr(function, "__name__", name)  # F.softmax may have been imported by another name
    return [*inner, *dict.fromkeys((name, own))]


def signature(module: nn.Module, calls: tuple[str, ...]) -> str:
    """What the calls are, one letter each: P matrix product, S softmax, D dropout; N an `nn.Softmax` over the last
    dimension that the module holds, A such a one by the name of `attend`."""
    return "".join(letters(name, module._modules.get(name)) for name in calls)


def letters(name: str, child: Optional[nn.Module]) -> str:
    if isinstance(child, nn.Sequential):
        return "".join(letters(name, each) for each in child)
    if isinstance(child, nn.Softmax) and child.dim == -1:
        return "A" if name.endswith("attend") else "N"
    if isinstance(child, nn.Dropout) or name == "dropout":
        return "D"
    if child is not None and not child._modules:  # a softmax of one's own
        inner = set(calls_in_forward(type(child)))
        return "S" if inner & SOFTMAX and not inner & PRODUCTS else ""
    return "P" if name in PRODUCTS else "S" * (name in SOFTMAX)


def is_softmax_then_dropout(letters: str) -> bool:
    """Each softmax is a module called `attend` or is followed by dropout, and lies between two matrix products: the
    style of vit-pytorch."""
    return bool(re.fullmatch("([PD]*P[PD]*(A|ND))+[PD]*P[PD]*", letters))


def looks_like_attention(letters: str) -> bool:
    return bool(re.search("P[^P]*[SNA].*P", letters))
