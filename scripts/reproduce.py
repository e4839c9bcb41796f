"""The tables of the paper: python scripts/reproduce.py plan|run|report table=schedule scale=cpu [option=value]

plan     what the table needs, what is done, and how long the rest will take
run      does what is missing, resumes what was interrupted, then reports
report   writes results/<table>-<scale>/ from the runs, at once

Options: seeds=3 or seeds=0,1,2 · output=runs · results=results · mixed=true (compare different versions)
plan:    probe=false (no trial of a few steps)
run:     jobs=2 (at once; else one per GPU, or per core up to 4) · gpus=auto|none|0,1 · per_gpu=2 · gpus_per_run=4
         retry=true (what failed before) · retries=1 (of what fails now) · entropy=false (of attention, not measured)
         launcher=slurm, with slurm.partition=... and other parameters of submitit
report:  records=results/schedule-cpu/records.jsonl (instead of runs)
Every other word is an override of train.py for all runs: data.root=/data trainer.device=cuda

Exit codes: 0 all done, 1 something failed, 2 config, 130 and 143 interrupted and saved.
"""

import dataclasses
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dropkey.config.check import nearest, require
from dropkey.config.schema import TrainConfig
from dropkey.errors import ConfigError, RunError
from dropkey.records import clock

ACTIONS = ("plan", "run", "report")


@dataclass
class Options:
    table: str = ""
    scale: str = ""
    seeds: str = ""
    output: str = "runs"
    results: str = "results"
    mixed: bool = False
    probe: bool = True
    jobs: int = 0
    gpus: str = "auto"
    per_gpu: int = 1
    gpus_per_run: int = 1
    retry: bool = False
    retries: int = 0
    entropy: bool = True
    launcher: str = "local"
    records: str = ""
    slurm: dict[str, str] = field(default_factory=dict)
    extra: list[str] = field(default_factory=list)


def read(words: list[str]) -> tuple[str, Options]:
    """The action and its options; raises ConfigError for what cannot be understood."""
    action = words[0] if words else "nothing"
    require(action in ACTIONS, f"{action} is no action; choices: {', '.join(ACTIONS)}")
    options = Options()
    kinds = {f.name: f.type for f in dataclasses.fields(Options) if f.name not in ("slurm", "extra")}
    for word in words[1:]:
        key, equals, value = word.partition("=")
        bare = key.lstrip("+~")
        if equals and key in kinds:
            setattr(options, key, typed(key, value, kinds[key]))
        elif equals and key.startswith("slurm."):
            options.slurm[key.removeprefix("slurm.")] = value
        elif equals and bare in ("seed", "overwrite", "init_from"):
            raise ConfigError(f"{word}: a table sets {bare} itself" + ("; take seeds=" if bare == "seed" else ""))
        elif equals and ("." in bare or bare in ("experiment", "debug") or hasattr(TrainConfig(), bare)):
            options.extra.append(word)
        else:
            raise ConfigError(f"{word} is no option{nearest(key, kinds)}")
    return action, options


def typed(key: str, value: str, kind: type):
    if kind is bool:
        require(value in ("true", "false"), f"{key}={value} must be true or false")
        return value == "true"
    if kind is int:
        require(value.isdigit(), f"{key}={value} must be a whole number")
        return int(value)
    return value


def seeds_of(text: str):
    """3, or 0,1,2; None for the scale's own."""
    parts = [part for part in text.split(",") if part]
    require(all(part.isdigit() for part in parts), f"seeds={text}: a number, or numbers with commas")
    if not parts:
        return None
    return tuple(map(int, parts)) if "," in text else tuple(range(int(parts[0])))


def main(words: list[str]) -> int:
    action, options = read(words)
    return {"plan": plan, "run": run, "report": report}[action](load(options), options)


def load(options: Options):
    from dropkey.reproduction import tables

    for key in ("table", "scale"):
        choices = f"; choices: {', '.join(tables.names())}" if key == "table" else ", such as scale=smoke"
        require(bool(getattr(options, key)), f"{key}= is missing{choices}")
    return tables.load(options.table, options.scale, seeds_of(options.seeds), tuple(options.extra))


def prepare(table, options: Options):
    from dropkey.reproduction import plan as planning
    from dropkey.reproduction.jobs import jobs_of
    from dropkey.reproduction.slots import slots

    places = slots(options.jobs or None, options.gpus, options.per_gpu, options.gpus_per_run)
    jobs = jobs_of(table, options.output)
    return jobs, planning.distinct(jobs.values()), places


def plan(table, options: Options) -> int:
    from rich.console import Console

    from dropkey.reproduction import display
    from dropkey.reproduction import plan as planning
    from dropkey.reproduction.runner import JobState

    console = Console(highlight=False, soft_wrap=True)
    jobs, distinct, places = prepare(table, options)
    console.print(f"{table.title}: {table.about}", markup=False)
    console.print(display.overview(table, jobs))
    console.print(display.legend(), style="dim")
    counts = planning.states(distinct)
    trainings = sum(job.script == "train.py" for job in distinct)
    listed = ", ".join(f"{count} {name}" for name, count in counts.items())
    console.print(f"{trainings} trainings, {len(distinct) - trainings} evaluations: {listed}")
    for job in distinct:
        found, reason = display.state(job)
        if reason and found in (display.FAILED, display.DIVERGED):
            console.print(display.describe(JobState(job, found, reason)), markup=False)
    cost = planning.estimate(distinct, places[0], Path(options.output), options.probe, console.print)
    if cost is not None:
        seconds, size = cost
        at_once = f", {len(places)} at once" if len(places) > 1 else ""
        free = planning.free_bytes(Path(options.output))
        console.print(
            f"to do: about {clock(seconds / len(places))} ({places[0]}{at_once}), {size / 2**20:,.0f} MiB of "
            f"{free / 2**20:,.0f} MiB free"
        )
    return 0


def run(table, options: Options) -> int:
    from rich.console import Console

    from dropkey.reproduction import display
    from dropkey.reproduction.jobs import DONE
    from dropkey.reproduction.runner import WAITING, Launcher

    require(options.launcher in ("local", "slurm"), f"launcher={options.launcher}; choices: local, slurm")
    here = dataclasses.replace(options, gpus_per_run=1) if options.launcher == "slurm" else options
    _, distinct, places = prepare(table, here)
    launcher = Launcher(distinct, places, options.retry, options.retries)
    if options.launcher == "slurm":
        from dropkey.reproduction import slurm

        gpus = 0 if options.gpus == "none" else options.gpus_per_run
        launcher.start = slurm.starter(options.slurm, Path(options.output), gpus)
        launcher.slots = slurm.slots(options.jobs, options.gpus_per_run, int(options.slurm.get("cpus_per_task", 1)))
    console = Console(highlight=False, soft_wrap=True)
    with display.Watch(console, f"{table.name}, {table.scale}") as watch:
        items = launcher.run(watch)
    lacking = [item for item in items if item.state != DONE]
    for item in lacking:
        if item.state != WAITING:  # stopped before its turn
            console.print(display.describe(item), markup=False)
    if launcher.stopped:
        again = f"python scripts/reproduce.py {' '.join(sys.argv[1:])}"
        console.print(f"interrupted, all saved; go on with: {again}", markup=False)
        return 128 + launcher.stopped
    trained = [item.job.run for item in items if item.state == DONE and item.job.script == "train.py"]
    if trained:
        if options.entropy:
            measure_entropy([run for run in trained if not (run / "entropy.json").exists()], console)
        report(table, options)
    failed = [item for item in lacking if item.state in (display.FAILED, display.DIVERGED)]
    if failed:
        console.print(f"{len(failed)} failed; the same command with retry=true tries them again")
    return 1 if lacking else 0


def measure_entropy(runs: list[Path], console) -> None:
    """In one process of its own: it imports torch, this program does not."""
    if not runs:
        return
    console.print("measuring the entropy of attention (entropy=false leaves that out)")
    script = str(Path(__file__).with_name("visualize.py"))
    with tempfile.TemporaryDirectory() as place:  # the records are wanted, the report draws them itself
        words = ["entropy", f"run={','.join(map(str, runs))}", f"output={place}/entropy.png"]
        done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True)
    if done.returncode != 0:  # a report without it is better than none
        console.print(f"no entropy: {done.stderr.strip()[-300:]}", markup=False)


def report(table, options: Options) -> int:
    from dropkey.reproduction import results
    from dropkey.reproduction.comparison import compare
    from dropkey.reproduction.document import build
    from dropkey.reproduction.jobs import jobs_of
    from dropkey.reproduction.writers import markdown_block, write

    directory = Path(options.results) / table.slug
    if options.records:
        head, found = results.read(Path(options.records), table.name, table.scale)
        directory = Path(options.records).parent
    else:
        head, found = results.header(table), results.gather(table, jobs_of(table, options.output))
    require(any(e["state"] == "done" for e in found), f"no run of table={table.name} scale={table.scale} is done yet")
    comparison = compare(table, head, found, results.require_one_version(found, options.mixed))
    if not options.records:
        results.write(directory / results.FILE, table, found)
    write(comparison, directory)
    for block in build(comparison)[:6]:
        print(markdown_block(block), end="\n\n")
    print(f"report {directory}/report.html (also .md, .tex, .csv, .json, records.jsonl and the pictures)")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
