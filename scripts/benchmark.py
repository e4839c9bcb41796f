"""What DropKey costs: python scripts/benchmark.py <what> [key=value ...], <what> being one of:

attention     the operator, forward and backward, beside other ways to drop keys (on a GPU FlexAttention among them)
regularizers  what the other regularizers cost
step          a whole training step
training      this project's training loop beside a bare one and one made of timm's parts
all           these four
tune          tilings of the Triton kernels, fastest first (GPU only)
decoding      images per second that one core decodes, and the cores that feed eight GPUs (root=<folder of JPEGs>)

Prints a table and writes it with hardware and versions to <output>/<action>-<device>.json, and a picture. Timings are
noisy, so each way alternates with plain attention; the ratio is that of the medians, the spread is the quartiles.
"""

import dataclasses
import functools
import itertools
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import dropkey  # noqa: E402
from benchmarks import decoding  # noqa: E402
from benchmarks.rivals import PLAIN, RATIO, flex, ways_for  # noqa: E402
from benchmarks.show import picture, table  # noqa: E402
from dropkey.config.check import require  # noqa: E402
from dropkey.config.script_args import arg, parse, run_script  # noqa: E402
from dropkey.provenance import git_commit, versions  # noqa: E402
from dropkey.records import hardware  # noqa: E402
from dropkey.regularizers import STRUCTURED  # noqa: E402

SHAPES = {  # B, H, N, D: ViT-Ti and ViT-S at 32 and 224 pixels on a CPU; as many tokens at any length on a GPU
    "cpu": [(64, 3, 65, 64), (32, 6, 197, 64), (8, 6, 577, 64)],
    "cuda": [(max(1, 32768 // n), 6, n, d) for d in (64, 128) for n in (65, 197, 577, 1024, 4096)],
}
STRUCTURED_SHAPE, GRID = (32, 6, 197, 64), (14, 14)
MODELS = {
    "cpu": {"model_name": "vit_tiny_patch16_224", "img_size": 32, "patch_size": 4, "num_classes": 10},
    "cuda": {"model_name": "vit_small_patch16_224", "img_size": 224, "patch_size": 16, "num_classes": 1000},
}
BATCH = {"cpu": 64, "cuda": 256}
LOOPS = {  # model, batch, steps, whether compiled: small images, where the loop itself counts, and ViT-S/16
    "cpu": [(MODELS["cpu"], 32, 2, False)],
    "cuda": [(MODELS["cpu"], 512, 40, False), *((MODELS["cuda"], 256, 20, compiled) for compiled in (False, True))],
}
AMP = {"float32": "none", "bfloat16": "bf16"}
DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("bfloat16",)}


# ------------------------------------------------------------------------------------------------- measuring


def seconds(action: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        begin = time.perf_counter()
        action()
        return time.perf_counter() - begin
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    events[0].record()
    action()
    events[1].record()
    events[1].synchronize()
    return events[0].elapsed_time(events[1]) / 1000


def measure(actions: dict[str, Callable], base: str, rounds: int, device: torch.device) -> list[dict]:
    """Median milliseconds and ratio of each action, each in turn with the base alone, because memory that one action
    leaves to the allocator would change the time of another. An action that fails gets its reason; the others go on."""
    rows = []
    for name, action in actions.items():
        times = []
        try:
            for _ in range(2):
                actions[base](), action()
            for _ in range(rounds):
                times.append((seconds(actions[base], device), seconds(action, device)))
        except Exception as error:
            reason = (str(error).strip().splitlines() or [""])[0][:200]
            rows.append({"way": name, "failed": f"{type(error).__name__}: {reason}"})
            continue
        own = statistics.median(time for _, time in times)
        plain = own if name == base else statistics.median(time for time, _ in times)
        low, _, high = statistics.quantiles((time / (time if name == base else other) for other, time in times), n=4)
        ratios = {"ratio": round(own / plain, 3), "quartiles": [round(low, 3), round(high, 3)]}
        rows.append({"way": name, "ms": round(own * 1000, 4), **ratios})
    return rows


def memory(action: Callable[[], Tensor], tensors: list[Tensor], grad: Tensor) -> int:
    """Bytes beyond the inputs: on a GPU the peak of forward and backward, on a CPU what is kept between the two."""
    if tensors[0].is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.autograd.grad(action(), tensors, grad)
        return torch.cuda.max_memory_allocated() - before
    kept, own = {}, {x.untyped_storage().data_ptr() for x in tensors}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        action()
    return sum(size for pointer, size in kept.items() if pointer not in own)


def error(way: Callable, tensors: list[Tensor], dropped: bool) -> dict[str, float]:
    """Largest deviation of the output and of the gradients of one sample from float64 under the same mask, relative
    to the largest entry."""
    sample = [x[:1].detach().requires_grad_() for x in tensors]
    exact = [x.detach().double().requires_grad_() for x in sample]
    grad, seed = torch.randn_like(sample[0]), torch.tensor(7, device=sample[0].device)
    wanted = dropkey.attention(*exact, ratio=RATIO if dropped else 0.0, impl="reference", seed=seed)
    wanted = [wanted, *torch.autograd.grad(wanted, exact, grad.double())]
    out = way(*sample, seed=seed) if dropped else way(*sample)
    found = [out, *torch.autograd.grad(out, sample, grad)]
    errors = [((a.double() - b).abs().max() / b.abs().max()).item() for a, b in zip(found, wanted, strict=True)]
    return {"output": float(f"{errors[0]:.2g}"), "gradients": float(f"{max(errors[1:]):.2g}")}


def inputs(shape: tuple[int, ...], dtype: str, device: torch.device) -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(0)
    make = functools.partial(torch.randn, shape, device=device, dtype=getattr(torch, dtype))
    return [make().requires_grad_() for _ in range(3)], make()


# ---------------------------------------------------------------------------------------------- what is measured


def attention(device: torch.device, rounds: int) -> list[dict]:
    rows = []
    for dtype, shape in itertools.product(DTYPES[device.type], SHAPES[device.type]):
        tensors, grad = inputs(shape, dtype, device)
        ways = ways_for(tensors[0])
        actions = {
            name: lambda way=way, tensors=tensors, grad=grad: torch.autograd.grad(way(*tensors), tensors, grad)
            for name, way in ways.items()
        }
        for row in measure(actions, PLAIN, rounds, device):
            if "failed" not in row:
                way = ways[row["way"]]
                row["MiB"] = round(memory(lambda way=way, tensors=tensors: way(*tensors), tensors, grad) / 2**20, 1)
                if row["way"] == PLAIN or "impl=" in row["way"].split(" (")[0] or way is flex:
                    row["error"] = error(way, tensors, dropped=row["way"].startswith("DropKey"))
            rows.append({"shape": list(shape), "dtype": dtype, **row})
    return rows


def regularizers(device: torch.device, rounds: int) -> list[dict]:
    names = [("dropkey", None), ("dropkey_column", None), ("dropout", None), ("dropattention", None)]
    names += [(name, window) for name in STRUCTURED for window in (3, 5, 7)] + [("dropkey_cross", "full")]
    shape, dtype = STRUCTURED_SHAPE, DTYPES[device.type][0]
    tensors, grad = inputs(shape, dtype, device)

    def run(regularizer: str, window: object) -> None:
        layout = {"grid": GRID, "num_prefix": 1, "window": window} if window else {}
        out = dropkey.attention(*tensors, regularizer=regularizer, ratio=RATIO, **layout)
        torch.autograd.grad(out, tensors, grad)

    actions = {PLAIN: lambda: torch.autograd.grad(F.scaled_dot_product_attention(*tensors), tensors, grad)}
    actions |= {f"{name} {window or ''}".strip(): functools.partial(run, name, window) for name, window in names}
    return [{"shape": list(shape), "dtype": dtype, **row} for row in measure(actions, PLAIN, rounds, device)]


def step(device: torch.device, rounds: int) -> list[dict]:
    import timm

    gpu, model_of, batch = device.type == "cuda", MODELS[device.type], BATCH[device.type]
    images = torch.randn(batch, 3, model_of["img_size"], model_of["img_size"], device=device)
    labels = torch.randint(10, (batch,), device=device)
    rows = []
    for dtype, compiled in itertools.product(DTYPES[device.type], (False, True) if gpu else (False,)):
        actions = {}
        for way, fused, arguments in (
            ("no regularizer", True, {"regularizer": "none"}),
            ("no regularizer, attention by parts", False, {"regularizer": "none"}),
            ("DropKey", True, {}),
            ("DropKey, attention by parts", False, {}),
            ("DropKey, impl=reference", True, {"impl": "reference"}),
            ("attention dropout", False, {"regularizer": "dropout"}),
        ):
            torch.manual_seed(0)
            timm.layers.set_fused_attn(fused)
            model = timm.create_model(**model_of).to(device)
            dropkey.apply(model, **{"ratio": RATIO, **arguments})
            optimizer = torch.optim.AdamW(model.parameters(), fused=gpu or None)
            model = torch.compile(model) if compiled else model
            actions[way] = functools.partial(train, model, optimizer, images, labels, dtype)
        timm.layers.set_fused_attn(True)
        for row in measure(actions, "no regularizer", rounds, device):
            speed = {} if "failed" in row else {"images/s": round(batch / row["ms"] * 1000, 1)}
            on = {"model": model_of["model_name"], "batch": batch, "pixels": model_of["img_size"]}
            rows.append({**on, "dtype": dtype, "compiled": compiled, **row, **speed})
    return rows


def train(model, optimizer, images: Tensor, labels: Tensor, dtype: str) -> None:
    with torch.autocast(images.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        loss = F.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def training(device: torch.device, rounds: int) -> list[dict]:
    from benchmarks import loops
    from dropkey.reproduction import cost

    rows = []
    for (model, batch, steps, compiled), dtype in itertools.product(LOOPS[device.type], DTYPES[device.type]):
        actions, cfg = loops.ways(model, batch, steps, AMP[dtype], device, compiled)
        flop = (1 + cost.BACKWARD) * cost.of_model(cfg)[0]
        for row in measure(actions, "bare loop", rounds, device):
            if "failed" not in row:
                row["ms"] = round(row["ms"] / steps, 4)
                row["images/s"] = round(batch / row["ms"] * 1000, 1)
                row["TFLOPS"] = round(flop * row["images/s"] / 1e12, 3)
            on = {"model": model["model_name"], "batch": batch, "pixels": model["img_size"]}
            rows.append({**on, "dtype": dtype, "compiled": compiled, **row})
    return rows


def tune(device: torch.device, rounds: int) -> list[dict]:
    """Each kernel's candidates, the other kernels as chosen."""
    from dropkey.operator import tiling

    rows, dtype = [], DTYPES[device.type][0]
    for shape in SHAPES[device.type]:
        tensors, grad = inputs(shape, dtype, device)
        chosen = tiling.tiling_of(*tensors[:2])

        def run(own, tensors=tensors, grad=grad):
            with tiling.using(own):
                out = dropkey.attention(*tensors, ratio=RATIO, impl="triton")
                torch.autograd.grad(out, tensors, grad)

        actions = {"as chosen": functools.partial(run, chosen)}
        for kernel, tiles in tiling.CANDIDATES.items():
            for tile in tiles:
                own = dataclasses.replace(chosen, **{kernel: tile})
                actions[f"{kernel} {dataclasses.astuple(tile)}"] = functools.partial(run, own)
        found = measure(actions, "as chosen", rounds, device)
        found.sort(key=lambda row: row.get("ms", math.inf))
        rows += [{"shape": list(shape), "dtype": dtype, **row} for row in found]
    return rows


MEASURED = {"attention": attention, "regularizers": regularizers, "step": step, "training": training}


@dataclasses.dataclass
class Args:
    action: str = arg("", "what to measure", choices=(*MEASURED, "all", "tune", "decoding"))
    device: str = arg("cuda" if torch.cuda.is_available() else "cpu", "where", choices=("cpu", "cuda"))
    rounds: int = arg(30, "how often each way is timed, 2 or more")
    root: str = arg("", "decoding: a folder of photographs")
    output: str = arg(str(ROOT / "benchmarks" / "results"), "directory of the results")


def main(words: list[str]) -> None:
    args = parse(Args, words, __doc__)
    require(args.rounds >= 2, f"rounds={args.rounds}: quartiles take 2 or more")
    require(args.device == "cpu" or torch.cuda.is_available(), "device=cuda: torch sees no CUDA GPU; use device=cpu")
    require(args.action != "tune" or args.device == "cuda", "tune: the Triton kernels need a GPU; use device=cuda")
    device, output = torch.device(args.device), Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    if args.action == "decoding":
        return decoding.run(args.root, args.rounds, output)
    for action in MEASURED if args.action == "all" else [args.action]:
        rows = (MEASURED | {"tune": tune})[action](device, args.rounds)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else hardware()
        origin = {"hardware": name, "threads": torch.get_num_threads(), "rounds": args.rounds, "ratio": RATIO}
        result = {"what": action, **origin, "versions": versions(), "commit": git_commit(), "rows": rows}
        path = output / f"{action}-{device.type}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
        if action != "tune":
            picture(rows, path.with_suffix(".png"), f"{action}, time over {rows[0]['way']}; {name}")
        print(f"{table(rows)}\n\n{name}, torch {torch.__version__}; written to {path}\n", flush=True)


if __name__ == "__main__":
    run_script(main)
