"""A table of runs of which half fail, worked on by two launchers, one of which is killed; then the same command again,
without the faults."""

import collections
import contextlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Iterator

from dropkey.records import RunDirectory
from dropkey.reproduction import tables
from dropkey.reproduction.jobs import DIVERGED, DONE, FAILED, Job, jobs_of
from soak.job import ROOT
from soak.training import unequal

ROWS = {
    "none": "regularizer=none",
    "dropout": "regularizer=dropout regularizer.ratio=0.2",
    "dropkey": "regularizer=dropkey regularizer.ratio=0.2",
    "dropkey, increasing": "regularizer=dropkey regularizer.ratio=0.2 schedule=increasing",
    "block": "regularizer=dropkey_block regularizer.ratio=0.2",
    "dropattention": "regularizer=dropattention regularizer.ratio=0.2",
}
OVERRIDES = ("trainer.epochs=6",)  # of 15 steps
STEP = 40  # where a fault strikes, in the third epoch
REASONS = {  # fault -> what the report must say of it; those that strike by themselves are in faults/sitecustomize.py
    "raises": "a made-up error",
    "exits": "SystemExit: 7",
    "exits at once": "exit code 7",
    "is killed": "killed by SIGKILL",
    "diverges": "loss nan",
    "fills its disk": "No space left",
    "may write 50 kB": "File too large",
}
SMALL_DISK, LARGE_DISK = "400k", "100m"  # room for one checkpoint and the best weights, and for all


@dataclass
class Result:
    runs: int = 0
    faults_of: dict[str, str] = field(default_factory=dict)  # run -> fault
    begun_before_kill: int = 0
    healthy: int = 0  # finished, with the result they have alone
    named: int = 0  # failed runs that the report names with their reason
    tries: int = 0  # of failed runs, by both launchers
    steps_again: int = 0  # trained by the same command without retry
    repaired: int = 0  # with the result they have alone
    untouched: int = 0  # healthy runs that the repair did not train
    resumed: int = 0  # repaired runs that went on from a checkpoint
    last_steps: int = 0  # trained by the same command once more
    faults: list[str] = field(default_factory=list)


@dataclass
class Step:
    second: float
    process: int
    run: str
    number: int


class Soak:
    def __init__(self, place: Path, seed: int, seeds: int, say: Callable[[str], None]):
        self.place, self.random, self.say = place, random.Random(seed), say
        self.seeds, self.result, self.launchers = tuple(range(seeds)), Result(), []
        place.mkdir(parents=True, exist_ok=True)
        rows = "".join(f'  "{label}": {overrides}\n' for label, overrides in ROWS.items())
        self.table = place / "soak.yaml"
        self.table.write_text(
            f"title: Soak\nbaseline: none\nrows:\n{rows}claims: [dropkey > none, dropkey > dropout]\n"
        )
        self.steps_file = place / "steps.txt"
        self.steps_file.touch()

    def check(self, right: bool, text: str) -> bool:
        if not right:
            self.result.faults.append(text)
            self.say(f"FAULT: {text}")
        return right

    # ------------------------------------------------------------------------------------------------------ processes

    def launcher(self, name: str, *words: str, faults: bool = False, output: str = "runs") -> subprocess.Popen:
        """`dropkey reproduce run`, its output in <name>.txt."""
        environment = os.environ | {
            "PYTHONPATH": str(Path(__file__).parent / "faults"),
            "SOAK_STEPS": str(self.steps_file if output == "runs" else os.devnull),
            "SOAK_STEP": str(STEP),
            "SOAK_FAULTS": json.dumps(self.result.faults_of if faults else {}),
            "CUDA_VISIBLE_DEVICES": "",
        }
        seeds = ",".join(map(str, self.seeds)) if len(self.seeds) > 1 else "1"
        common = [f"table={self.table}", "scale=smoke", f"seeds={seeds}", f"output={self.place / output}", *OVERRIDES]
        common += [f"results={self.place / output}-results", "entropy=false"]
        command = [sys.executable, str(ROOT / "scripts" / "reproduce.py"), "run", *common, *words]
        with open(self.place / f"{name}.txt", "w") as file:
            process = subprocess.Popen(command, env=environment, cwd=self.place, stdout=file, stderr=subprocess.STDOUT)
        self.launchers.append(process)
        return process

    def said(self, name: str) -> str:
        return (self.place / f"{name}.txt").read_text(errors="replace")

    def jobs(self, output: str = "runs") -> dict[str, Job]:
        table = tables.load(str(self.table), "smoke", self.seeds, OVERRIDES)
        return {job.run.name: job for job in jobs_of(table, str(self.place / output)).values()}

    def steps(self) -> list[Step]:
        lines = [line.split(" ") for line in self.steps_file.read_text().splitlines()]
        return [Step(float(second), int(process), run, int(number)) for second, process, run, number in lines]

    @contextlib.contextmanager
    def killer(self) -> Iterator[None]:
        """From outside, SIGKILL to every process that has trained a run which `is killed` so far."""
        over, done = threading.Event(), set()

        def watch() -> None:
            while not over.wait(0.05):
                for step in self.steps():
                    wanted = self.result.faults_of.get(step.run) == "is killed" and step.number >= STEP
                    if wanted and step.process not in done:
                        done.add(step.process)
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(step.process, signal.SIGKILL)

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    @contextlib.contextmanager
    def small_disks(self) -> Iterator[list[Path]]:
        """A small file system in place of the checkpoints of each run that `fills its disk`."""
        mounted = []
        try:
            for name, job in self.jobs().items():
                if self.result.faults_of.get(name) == "fills its disk":
                    folder = RunDirectory(job.run).checkpoints
                    folder.mkdir(parents=True)
                    mount("-t", "tmpfs", "-o", f"size={SMALL_DISK}", "tmpfs", str(folder))
                    mounted.append(folder)
            yield mounted
        finally:
            for folder in mounted:
                subprocess.run(["umount", "-l", str(folder)], check=False)

    # ---------------------------------------------------------------------------------------------------------- parts

    def run(self) -> Result:
        names = list(self.jobs())
        kinds = [kind for kind in REASONS if kind != "fills its disk" or os.geteuid() == 0]
        kinds = kinds if len(self.seeds) > 1 else self.random.sample(kinds, 4)
        self.result.faults_of = dict(zip(self.random.sample(names, len(kinds)), kinds, strict=True))
        self.result.runs = len(names)
        alone = self.launcher("alone", "jobs=2", output="alone")
        if not self.check(alone.wait() == 0, f"the table alone does not finish: {self.said('alone')[-1500:]}"):
            return self.result
        self.say(f"launchers: {len(names)} runs trained alone, without a fault")
        with self.small_disks() as disks:
            self.two_launchers()
            for folder in disks:
                mount("-o", f"remount,size={LARGE_DISK}", str(folder))
            self.again()
        return self.result

    def two_launchers(self) -> None:
        with self.killer():
            both = [self.launcher(name, "jobs=1", faults=True) for name in ("first", "second")]
            victim, other = self.random.sample(both, 2)
            moment = self.random.randint(self.result.runs // 3, self.result.runs // 2)
            while len({step.run for step in self.steps()}) < moment and all(one.poll() is None for one in both):
                time.sleep(0.1)
            time.sleep(self.random.uniform(0, 3))
            self.result.begun_before_kill = len({step.run for step in self.steps()})
            self.check(victim.poll() is None, "a launcher ended before it could be killed")
            victim.kill()
            victim.wait()
            self.say(f"launchers: one killed when {self.result.begun_before_kill} runs had begun")
            code = other.wait()
        said = self.said("first" if other is both[0] else "second")
        self.check(code == 1, f"the launcher that was left ended with code {code}, not 1: {said[-1500:]}")
        self.check("Traceback" not in said, f"a traceback of the launcher: {said[-1500:]}")
        self.at_once()
        self.healthy()
        self.report()

    def at_once(self) -> None:
        """No run may be trained by two processes at the same time."""
        spans = collections.defaultdict(dict)
        for step in self.steps():
            begin, _ = spans[step.run].get(step.process, (step.second, None))
            spans[step.run][step.process] = (begin, step.second)
        for run, found in spans.items():
            inner = sorted(found.values())
            for (_, end), (begin, _) in itertools.pairwise(inner):
                self.check(end <= begin, f"{run} was trained by two processes at once")
            self.result.tries += len(found) if run in self.result.faults_of else 0

    def healthy(self) -> None:
        alone, counts = self.jobs("alone"), collections.Counter((step.run, step.number) for step in self.steps())
        for name, job in self.jobs().items():
            if name in self.result.faults_of:
                continue
            run = RunDirectory(job.run)
            right = self.check(run.finished, f"{name}, which is healthy, did not finish: {run.status()}")
            right = right and self.is_equal(name, run, RunDirectory(alone[name].run))
            repeated = max((times for (of, _), times in counts.items() if of == name), default=0)
            right = right and self.check(repeated == 1, f"{name}, which is healthy, trained steps {repeated} times")
            self.result.healthy += right

    def is_equal(self, name: str, run: RunDirectory, alone: RunDirectory) -> bool:
        difference = unequal(alone, run)
        return self.check(difference is None, f"{name} differs from the same run alone in {difference}")

    def report(self) -> None:
        """Every failed run with its reason, and no other run than finished ones in a number."""
        directory = self.place / "runs-results" / "soak-smoke"
        report, text = json.loads((directory / "report.json").read_text()), (directory / "report.md").read_text()
        states = {entry["run"]: entry for entry in report["runs"]}
        for name, fault in self.result.faults_of.items():
            entry = states[name]
            right = entry["state"] == (DIVERGED if fault == "diverges" else FAILED) and entry.get("top1") is None
            right = right and REASONS[fault] in entry["reason"] and REASONS[fault] in text
            self.result.named += self.check(right, f"the report says of {name}, which {fault}: {entry}")
        done = {name for name, entry in states.items() if entry["state"] == DONE}
        self.check(not done & set(self.result.faults_of), "the report counts a run that did not finish")
        for name in done:
            top1 = RunDirectory(self.jobs("alone")[name].run).summary()["top1"]
            self.check(states[name]["top1"] == top1, f"the report has {states[name]['top1']} for {name}, not {top1}")

    def again(self) -> None:
        """The same command, without the faults: first as it was, then with retry=true, then once more."""
        before = len(self.steps())
        code = self.launcher("again", "jobs=2").wait()
        self.result.steps_again = len(self.steps()) - before
        self.check(code == 1, f"the same command ended with code {code}, not 1: {self.said('again')[-1500:]}")
        self.check(self.result.steps_again == 0, f"the same command trained {self.result.steps_again} steps unasked")

        code = self.launcher("retry", "jobs=2", "retry=true").wait()
        self.check(code == 0, f"the same command with retry=true ended with code {code}: {self.said('retry')[-1500:]}")
        alone, first = self.jobs("alone"), {}
        for step in self.steps()[before:]:
            first.setdefault(step.run, step.number)
        for name, job in self.jobs().items():
            run = RunDirectory(job.run)
            if name not in self.result.faults_of:
                self.result.untouched += self.check(name not in first, f"{name}, which was done, was trained again")
            elif self.check(run.finished, f"{name} was not repaired: {run.status()}"):
                self.result.repaired += self.is_equal(name, run, RunDirectory(alone[name].run))
                self.result.resumed += first.get(name, 1) > 1
        report = self.place / "runs-results" / "soak-smoke" / "report.md"
        before, text = len(self.steps()), report.read_bytes()
        code = self.launcher("once-more", "jobs=2", "retry=true").wait()
        self.result.last_steps = len(self.steps()) - before
        self.check(code == 0 and not self.result.last_steps, f"a third time: {self.said('once-more')[-1500:]}")
        self.check(report.read_bytes() == text, "the report changed although nothing was trained")


def mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True)


def soak(place: Path, quick: bool, seed: int, say: Callable[[str], None]) -> Result:
    one = Soak(place, seed, 1 if quick else 2, say)
    try:
        return one.run()
    finally:  # after Ctrl-C, say: they stop their trainings, which save
        for process in one.launchers:
            process.terminate()
