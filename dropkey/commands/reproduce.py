"""The paper's tables: dropkey reproduce plan|run|report table=schedule scale=cpu [key=value]

plan     shows which runs the table needs, which are finished, and how long the rest takes
run      starts missing runs, resumes interrupted ones, then reports
report   writes results/<table>-<scale>/ from the runs that are finished

All other words are overrides of train for every run: data.root=/data trainer.device=cuda
Exit codes: 0 all done, 1 something failed, 2 config, 130 and 143 interrupted and saved.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Dict, Optional

from dropkey.config.check import nearest, require
from dropkey.config.schema import TrainConfig
from dropkey.config.script_args import arg, parse, run_script, split


@dataclass
class Args:
    action: str = arg("", "what to do", choices=("plan", "run", "report"))
    table: str = arg("", "a table of configs/table, or the path of a YAML file")
    scale: str = arg("", "smoke, cpu, small, paper, or one of the table's own")
    seeds: str = arg("", "seeds to run now: their number, or a list such as 0,1,2; empty: as the table plans")
    until: str = arg(
        "planned", "run: all planned seeds, or until every claim is decided", choices=("planned", "decided")
    )
    max_seeds: int = arg(20, "until=decided: at most this many")
    delta: float = arg(0.0, "plan: the difference to find; shows how many seeds and hours each claim needs")
    power: float = arg(0.8, "plan delta=: the chance of finding it")
    deviation: Optional[float] = arg(
        None, "plan delta=: standard deviation of a claim's difference over seeds; null: from the records"
    )
    gpu: str = arg("", "plan: hours on this GPU: a100, h100, h200, l40s, or its dense TFLOPS in bf16")
    utilisation: float = arg(0.4, "plan gpu=: share of these TFLOPS that training reaches")
    price: float = arg(0.0, "plan gpu=: price of one GPU hour")
    output: str = arg("runs", "directory of the runs")
    results: str = arg("results", "directory of the reports")
    mixed: bool = arg(False, "compare runs of different code versions; the report shows it")
    jobs: int = arg(0, "run: at most this many at a time; 0: one per GPU, or per core up to 4")
    gpus: str = arg("auto", "run: auto, none, or numbers such as 0,1")
    per_gpu: int = arg(1, "run: runs that share a GPU")
    gpus_per_run: int = arg(1, "run: GPUs of one run")
    retry: bool = arg(False, "run: repeat what failed in an earlier call")
    outdated: str = arg(
        "refuse", "run: finished runs that new ones cannot be compared with", choices=("refuse", "retrain")
    )
    entropy: bool = arg(True, "run: measure the entropy of attention, for the report")
    launcher: str = arg("local", "run: where", choices=("local", "slurm"))
    slurm: Dict[str, str] = arg({}, "run: parameters of submitit, such as slurm.partition=gpu")
    records: Optional[str] = arg(None, "report: use this file of records instead of the runs")


def read(words: list[str]) -> tuple[Args, tuple[str, ...]]:
    """The script's arguments, and the overrides for all runs."""
    own, overrides = split(Args, words)
    known = {field.name for field in dataclasses.fields(Args)}
    for override in overrides:
        key = override.partition("=")[0].lstrip("+~")
        require(key not in ("seed", "overwrite"), f"{override}: a table sets {key} itself (see seeds=)")
        exists = "." in key or key in ("experiment", "debug") or hasattr(TrainConfig(), key)
        require(exists, f"{override}: {key} is not an argument{nearest(key, known)}")
    return parse(Args, own, __doc__), tuple(overrides)


def main(words: list[str]) -> int:
    args, overrides = read(words)
    from dropkey.reproduction.study import Study

    study = Study(load(args, overrides), args)
    return {"plan": study.plan, "run": study.run, "report": study.report}[args.action]()


def load(args: Args, overrides: tuple[str, ...]):
    from dropkey.reproduction import tables
    from dropkey.reproduction.table_parts import read_seeds

    require(bool(args.table), f"table= is missing; choices: {', '.join(tables.names())}")
    require(bool(args.scale), "scale= is missing, such as scale=smoke")
    require(0 <= args.delta < math.inf, f"delta={args.delta} must be above 0")
    require(0 < args.power < 1, f"power={args.power} must be between 0 and 1")
    require(args.deviation is None or 0 < args.deviation < math.inf, f"deviation={args.deviation} must be above 0")
    require(0 < args.utilisation <= 1, f"utilisation={args.utilisation} must be above 0 and at most 1")
    require(0 <= args.price < math.inf, f"price={args.price} must be 0 or more")
    parts = [part for part in args.seeds.split(",") if part]
    require(
        all(part.isascii() and part.isdigit() and len(part) < 20 for part in parts),
        f"seeds={args.seeds[:60]}: a number, or numbers with commas",
    )
    seeds = read_seeds([*map(int, parts)] if "," in args.seeds else int(parts[0]), "") if parts else None
    table = tables.load(args.table, args.scale, seeds, overrides)
    begun = next((row.label for row in table.rows.values() if row.of), None)
    given = any(override.startswith("init_from=") for override in overrides)
    require(not (begun and given), f"init_from: row '{begun}' of this table starts from runs of another row")
    if args.until == "planned":
        return table
    require(not parts, "until=decided chooses the seeds itself: leave out seeds=, or say max_seeds=")
    return tables.until_decided(table, args.max_seeds)


def start() -> None:
    run_script(main)
