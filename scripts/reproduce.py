"""The paper's tables: python scripts/reproduce.py plan|run|report table=schedule scale=cpu [key=value]

plan     shows which runs the table needs, which are finished, and how long the rest takes
run      starts what is missing, resumes what was interrupted, then reports
report   writes results/<table>-<scale>/ from the runs that are finished

All other words are overrides of train.py for every run: data.root=/data trainer.device=cuda
Exit codes: 0 all done, 1 something failed, 2 config, 130 and 143 interrupted and saved.
"""

import dataclasses
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, Optional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dropkey.config.check import nearest, require
from dropkey.config.schema import TrainConfig
from dropkey.config.script_args import arg, parse, run_script, split
from dropkey.errors import ConfigError
from dropkey.records import clock


@dataclass
class Args:
    action: str = arg("", "what to do", choices=("plan", "run", "report"))
    table: str = arg("", "a table of configs/table, or the path of a YAML file")
    scale: str = arg("", "smoke, cpu, small, paper, or one of the table's own")
    seeds: str = arg("", "their number, or a list such as 0,1,2; empty: as the scale has it")
    output: str = arg("runs", "directory of the runs")
    results: str = arg("results", "directory of the reports")
    mixed: bool = arg(False, "compare runs of different versions; the report shows it")
    jobs: int = arg(0, "run: at most this many at a time; 0: one per GPU, or per core up to 4")
    gpus: str = arg("auto", "run: auto, none, or numbers such as 0,1")
    per_gpu: int = arg(1, "run: runs that share a GPU")
    gpus_per_run: int = arg(1, "run: GPUs of one run")
    retry: bool = arg(False, "run: what failed in an earlier call")
    outdated: str = arg(
        "refuse", "run: finished runs that new ones cannot be compared with", choices=("refuse", "retrain")
    )
    entropy: bool = arg(True, "run: measure the entropy of attention, for the report")
    launcher: str = arg("local", "run: where", choices=("local", "slurm"))
    slurm: Dict[str, str] = arg({}, "run: parameters of submitit, such as slurm.partition=gpu")
    records: Optional[str] = arg(None, "report: from this file of records instead of the runs")


def read(words: list[str]) -> tuple[Args, tuple[str, ...]]:
    """The script's arguments, and the overrides for all runs."""
    own, overrides = split(Args, words)
    known = {field.name for field in dataclasses.fields(Args)}
    for override in overrides:
        key = override.partition("=")[0].lstrip("+~")
        require(key not in ("seed", "overwrite", "init_from"), f"{override}: a table sets {key} itself (see seeds=)")
        exists = "." in key or key in ("experiment", "debug") or hasattr(TrainConfig(), key)
        require(exists, f"{override}: {key} is not an argument{nearest(key, known)}")
    return parse(Args, own, __doc__), tuple(overrides)


def main(words: list[str]) -> int:
    args, overrides = read(words)
    return {"plan": plan, "run": run, "report": report}[args.action](load(args, overrides), args)


def load(args: Args, overrides: tuple[str, ...]):
    from dropkey.reproduction import tables

    require(bool(args.table), f"table= is missing; choices: {', '.join(tables.names())}")
    require(bool(args.scale), "scale= is missing, such as scale=smoke")
    parts = [part for part in args.seeds.split(",") if part]
    require(all(part.isdigit() for part in parts), f"seeds={args.seeds}: a number, or numbers with commas")
    seeds = tuple(map(int, parts)) if "," in args.seeds else tuple(range(int(args.seeds or 0)))
    return tables.load(args.table, args.scale, seeds if parts else None, overrides)


def plan(table, args: Args) -> int:
    from rich.console import Console

    from dropkey.reproduction import display
    from dropkey.reproduction import plan as planning
    from dropkey.reproduction.jobs import DIVERGED, FAILED, distinct, jobs_of, state
    from dropkey.reproduction.slots import slots

    console = Console(highlight=False, soft_wrap=True, markup=False)
    jobs = jobs_of(table, args.output)
    todo = distinct(jobs)
    console.print(f"{table.title}: {table.about}")
    console.print(display.overview(table, jobs))
    console.print(display.LEGEND, style="dim")
    console.print(display.counts(todo))
    for job in todo:
        if state(job)[0] in (FAILED, DIVERGED):
            console.print(display.describe(job, *state(job)))
    for line in explain_outdated(planning.outdated(todo)):
        console.print(line)
    places = slots(args.jobs, args.gpus, args.per_gpu, args.gpus_per_run)
    seconds, size, unknown = planning.estimate(todo)
    if seconds:
        at_once = f"{len(places)} at a time" if len(places) > 1 else str(places[0])
        console.print(f"about {clock(seconds / len(places))} ({at_once}), {size / 2**20:,.0f} MiB")
    if unknown:
        console.print(f"time of {unknown} jobs: not known until a first run of their model and data is finished")
    return 0


def explain_outdated(found: dict) -> list[str]:
    return [f"cannot be compared with new runs: {job.name}, because {reason}" for job, reason in found.items()]


def run(table, args: Args) -> int:
    from rich.console import Console

    from dropkey.reproduction import display, plan, runner
    from dropkey.reproduction.jobs import DIVERGED, DONE, FAILED, distinct, jobs_of
    from dropkey.reproduction.slots import slots

    console = Console(highlight=False, soft_wrap=True, markup=False)
    jobs = distinct(jobs_of(table, args.output))
    launcher = runner.Launcher(jobs, [], args.retry)
    if args.launcher == "slurm":
        from dropkey.reproduction import slurm

        gpus = 0 if args.gpus == "none" else args.gpus_per_run
        launcher.start = slurm.submitter(args.slurm, Path(args.output), gpus)
        launcher.slots = slurm.queue_slots(args.jobs, args.gpus_per_run, int(args.slurm.get("cpus_per_task", 1)))
    else:
        launcher.slots = slots(args.jobs, args.gpus, args.per_gpu, args.gpus_per_run)
    outdated = {} if args.mixed else plan.outdated(jobs, args.retry)
    if outdated and args.outdated == "refuse":
        raise ConfigError(
            f"{len(outdated)} finished runs {explain_outdated(outdated)[0]}; outdated=retrain trains them again and "
            "overwrites them, mixed=true compares them all the same, a new output= trains everything"
        )
    for job in outdated:
        runner.discard(job)
    states = launcher.run(display.watch(console.print))
    left = [one for one in states if one.state != DONE]
    for one in left:
        if one.state != runner.WAITING:  # stopped before its turn
            console.print(display.describe(one.job, one.state, one.reason))
    if launcher.stopped:
        console.print(f"interrupted, all saved; go on with: python scripts/reproduce.py {' '.join(sys.argv[1:])}")
        return 128 + launcher.stopped
    trained = [one.job.run for one in states if one.state == DONE and not one.job.evaluation]
    if trained:
        if args.entropy:
            measure_entropy([run for run in trained if not (run / "entropy.json").exists()], console)
        report(table, args)
    failed = sum(one.state in (FAILED, DIVERGED) for one in left)
    if failed:
        console.print(f"{failed} failed; the same command with retry=true tries them again")
    return 1 if left else 0


def measure_entropy(runs: list[Path], console) -> None:
    """In a process of its own, because it imports torch."""
    if not runs:
        return
    console.print("measuring the entropy of attention (entropy=false skips it)")
    script = str(Path(__file__).with_name("visualize.py"))
    with tempfile.TemporaryDirectory() as place:  # the report draws its own picture, from entropy.json in each run
        words = ["entropy", f"run={','.join(map(str, runs))}", f"output={place}/entropy.png"]
        done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True)
    if done.returncode != 0:  # a report without it is better than none
        console.print(f"no entropy: {done.stderr.strip()[-300:]}")


def report(table, args: Args) -> int:
    from dropkey.reproduction import results
    from dropkey.reproduction.comparison import compare
    from dropkey.reproduction.jobs import jobs_of
    from dropkey.reproduction.report import write

    if args.records:
        directory = Path(args.records).parent
        head, found = results.read(Path(args.records), table)
    else:
        directory = Path(args.results) / table.slug
        head, found = results.gather(table, jobs_of(table, args.output))
    done = any(entry["state"] == "done" for entry in found)
    require(done, f"no run of table={table.name} scale={table.scale} is finished yet")
    mixed = results.require_one_version(found, args.mixed)
    if not args.records:
        results.write(directory / results.FILE, head, found)
    text = write(compare(table, head, found, mixed), directory)
    print(text.split("\n## Differences")[0])
    print(f"report {directory}/report.html (also .md, .tex, .csv, .json, {results.FILE} and the pictures)")
    return 0


if __name__ == "__main__":
    run_script(main)
