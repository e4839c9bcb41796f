"""A training of two processes that is killed at random moments and resumed by the same command, lap after lap: each
lap's files are those of the training that nobody killed."""

import collections
import random
import re
import shutil
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable

import runs
from dropkey.records import RunDirectory
from soak.job import ROOT, Life, start, words_of
from soak.watching import Family, Growth, command_line

NOT_COMPARED = ("seconds", "samples_per_second", "run", "peak_memory_mib", "commit")
KILLS = tuple(
    (number, target)
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
    for target in ("one rank", "torchrun", "all")
)
COMMANDS = 0.15  # share of the lives that the command itself starts, which takes longer than a fork
QUICK = 300  # seconds: in less, everything is small
PATIENCE = 120  # seconds after a signal until nothing may be left
OWN_TRACEBACK = re.compile(f'File "{re.escape(str(ROOT))}/(dropkey/|train.py)')
LONGEST = 1800  # seconds of a life that nobody kills
WARM_UP = 3  # epochs until the uninterrupted stretch counts: the first evaluation starts its own data worker
GROWTH_MIB, GROWTH_HANDLES = 16, 2  # bounds: a leak of a batch or a handle per epoch is far beyond
LIFE_MIB, LIFE_HANDLES = 64, 10  # of a life among the kills, which has its first evaluation within


@dataclass
class Result:
    laps: int = 0
    exact: int = 0
    kills: collections.Counter = field(default_factory=collections.Counter)
    early: int = 0  # of these, before the first step
    commands: int = 0  # of these, under a torchrun that was started as a user starts it
    asked: int = 0  # to stop, while it trained
    saved: int = 0
    resumes: list[float] = field(default_factory=list)  # seconds from start to the first new step
    refused: int = 0  # second starts while a killed torchrun's processes went on
    longest: Growth = field(default_factory=Growth)
    flat: Growth = field(default_factory=Growth)
    flat_epochs: int = 0
    faults: list[str] = field(default_factory=list)


class Soak:
    def __init__(self, place: Path, seconds: float, seed: int, say: Callable[[str], None]):
        self.place, self.random, self.say = place, random.Random(seed), say
        self.until, self.quick = time.monotonic() + seconds, seconds < QUICK
        self.epochs = 6 if self.quick else 50
        self.between, self.time_is_over = 0.0, False  # mean seconds of training until a kill; then none comes any more
        self.result, self.lives, self.deck = Result(), 0, []
        place.mkdir(parents=True, exist_ok=True)

    def fault(self, text: str) -> None:
        self.result.faults.append(text)
        self.say(f"FAULT: {text}")

    def run_in(self, output: Path) -> RunDirectory | None:
        found = [path for path in output.glob("*") if (path / "config.yaml").exists()]
        return RunDirectory(found[0]) if found else None

    # ------------------------------------------------------------------------------------------------- uninterrupted

    def reference(self) -> RunDirectory:
        output = self.place / "reference"
        life = start(words_of(output, self.epochs), self.place, "reference", forked=True)
        with life.family:
            code = life.wait()
        run = self.run_in(output)
        if code != 0 or run is None or not run.finished:
            raise SystemExit(f"error: the reference does not train: {life.errors[-2000:]}")
        self.between = run.summary()["seconds"] / (3 if self.quick else 10)
        return run

    def flat(self, seconds: float) -> None:
        """An uninterrupted stretch of the command itself; then SIGTERM to torchrun, which must save."""
        output = self.place / "flat"
        life = start(words_of(output, 10**6), self.place, "flat", forked=False)
        with life.family as family:
            if not self.first_step(life, output, None):
                return self.fault(f"the uninterrupted stretch does not start: {life.errors[-2000:]}")
            while len(self.run_in(output).records("epoch")) < WARM_UP and self.still_trains(family, 1):
                pass
            began = time.monotonic()
            self.still_trains(family, seconds)
            self.result.flat = family.growth(began)
            family.signal(signal.SIGTERM, [family.root])
            life.wait()
            family.wait_until_gone(PATIENCE)
        self.check_stop("flat", output, signal.SIGTERM, "torchrun", life)
        self.result.flat_epochs = len(self.run_in(output).records("epoch")) - WARM_UP
        shutil.rmtree(output)

    # ------------------------------------------------------------------------------------------------------- one lap

    def lap(self, reference: RunDirectory) -> None:
        output = self.place / "lap"
        shutil.rmtree(output, ignore_errors=True)
        lives = 0
        while lives == 0 or not ((run := self.run_in(output)) and run.finished):
            lives += 1
            self.time_is_over = time.monotonic() > self.until
            if lives > 200:
                return self.fault("a lap does not come to its end")
            self.life(output, forked=self.quick or self.random.random() > COMMANDS)
        self.result.laps += 1
        difference = unequal(reference, run)
        if difference:
            kept = output.rename(self.place / f"differs-{self.result.laps}")
            return self.fault(f"lap {self.result.laps} differs in {difference}; kept in {kept}")
        self.result.exact += 1

    def life(self, output: Path, forked: bool) -> None:
        """Starts, and kills at a random moment, unless the training comes to its end before."""
        self.lives += 1
        number, target = self.draw()
        early = self.random.random() < 0.2
        before = self.metrics_file(output)
        life = start(words_of(output, self.epochs), self.place, f"life-{self.lives}", forked)
        with life.family as family:
            struck = not self.time_is_over and self.moment(life, output, before, early, forked)
            if struck:
                self.kill(family, number, target)
                self.result.kills[number.name, target] += 1
                self.result.commands += not forked
                self.result.early += early
                if number == signal.SIGKILL and target == "torchrun":  # the others do not know
                    if not early and not forked:
                        self.start_again_beside(output)
                    family.signal(signal.SIGTERM, family.alive())
            left = family.wait_until_gone(PATIENCE if struck else LONGEST)
            if left:
                shown = "; ".join(f"{pid} {command_line(pid)[:80]}" for pid in left)
                self.fault(f"life {self.lives}: long after {number.name} to {target} there are still {shown}")
                family.signal(signal.SIGKILL, left)
            life.wait()
        run = self.run_in(output)
        if struck and not early:
            self.check_stop(f"life {self.lives}", output, number, target, life)
        elif not struck and not (run and run.finished):
            self.fault(f"life {self.lives} ended by itself: {life.errors[-1500:]}")
        if not self.result.faults:
            for stream in life.streams:
                stream.unlink(missing_ok=True)

    def moment(self, life: Life, output: Path, before: int | None, early: bool, forked: bool) -> bool:
        """Waits for a random moment, `early` while it starts, else while it trains; False if it ends before."""
        family, began = life.family, time.monotonic()
        if early:
            return self.still_trains(family, self.random.uniform(0, 6 if forked else 30))
        if not self.first_step(life, output, before):
            return False
        trains = time.monotonic()
        if before:
            self.result.resumes.append(trains - began)
        if not self.still_trains(family, self.random.uniform(0, 2 * self.between)):
            return False
        stretch = family.growth(trains + 3)
        self.result.longest = max(self.result.longest, stretch, key=lambda growth: growth.seconds)
        return True

    def draw(self) -> tuple[signal.Signals, str]:
        """Every kind of kill comes once before any comes again."""
        if not self.deck:
            self.deck = self.random.sample(KILLS, len(KILLS))
        return self.deck.pop()

    def first_step(self, life: Life, output: Path, before: int | None) -> bool:
        """Waits until metrics.jsonl, which was the file `before`, is replaced, as it is where a training begins or
        resumes, and has grown; False if the command ends first."""
        size = None
        while life.family.root in life.family.alive():
            run = self.run_in(output)
            if run and run.metrics.exists() and (now := run.metrics.stat()).st_ino != before:
                if size is not None and now.st_size > size:
                    return True
                size = now.st_size
            time.sleep(0.05)
        return False

    def metrics_file(self, output: Path) -> int | None:
        run = self.run_in(output)
        return run.metrics.stat().st_ino if run and run.metrics.exists() else None

    def still_trains(self, family: Family, seconds: float) -> bool:
        """Waits; whether the command is still there afterwards."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if family.root not in family.alive():
                return False
            time.sleep(0.02)
        return True

    def kill(self, family: Family, number: int, target: str) -> None:
        family.look()
        ranks = family.children()
        chosen = {"one rank": ranks and [self.random.choice(ranks)], "torchrun": [family.root], "all": family.alive()}
        family.signal(number, chosen[target] or [family.root])

    def start_again_beside(self, output: Path) -> None:
        """The same command while the processes of a killed torchrun go on: it must be refused, or find them done."""
        life = start(words_of(output, self.epochs), self.place, f"life-{self.lives}-beside", forked=False)
        with life.family as family:
            code = life.wait()
            left = family.wait_until_gone(PATIENCE)
        if left:
            self.fault(f"life {self.lives}: the start beside it does not end")
            family.signal(signal.SIGKILL, left)
        if code != 0 and "is being trained by process" in life.errors:
            self.result.refused += 1
        elif code != 0:
            self.fault(f"life {self.lives}: the start beside it: code {code}, {life.errors[-1500:]}")

    # -------------------------------------------------------------------------------------------------------- checks

    def check_stop(self, name: str, output: Path, number: int, target: str, life: Life) -> None:
        """A request to stop that came while it trained must have saved. (SIGINT to all reaches each rank twice, once
        through torchrun, and a second Ctrl-C stops at once.)"""
        if number == signal.SIGINT and target == "all":
            return
        if OWN_TRACEBACK.search(life.errors):
            self.fault(f"{name}: a traceback after {signal.Signals(number).name} to {target}: {life.errors[-3000:]}")
        if number == signal.SIGKILL:
            return
        self.result.asked += 1
        status = self.run_in(output).status()
        saved = status["state"] == "interrupted" and "all saved" in status.get("reason", "")
        if saved or status["state"] == "done":
            self.result.saved += 1
        else:
            self.fault(
                f"{name}: {signal.Signals(number).name} to {target} did not save: {status} {life.errors[-1500:]}"
            )


def unequal(whole: RunDirectory, parts: RunDirectory) -> str | None:
    """Where two finished runs differ, apart from their clocks."""
    for name in ("last.pt", "best.pt"):
        if difference := runs.unequal(runs.state(whole, name), runs.state(parts, name)):
            return f"{name}{difference}"
    if runs.records(whole) != runs.records(parts):
        return "metrics.jsonl"
    one, other = ({k: v for k, v in run.summary().items() if k not in NOT_COMPARED} for run in (whole, parts))
    if difference := runs.unequal(one, other):
        return f"summary.json{difference}"
    return None if whole.correct("summary.json") == parts.correct("summary.json") else "summary.bits"


def soak(place: Path, seconds: float, seed: int, say: Callable[[str], None]) -> Result:
    """Laps until the time is over; the last one then comes to its end without further kills."""
    one = Soak(place, seconds, seed, say)
    reference = one.reference()
    say(f"reference trained: {reference.path.name}")
    one.flat(10 if one.quick else min(480, seconds / 6))
    say(f"uninterrupted stretch: {one.result.flat}")
    while True:
        one.lap(reference)
        result, killed = one.result, sum(one.result.kills.values())
        say(f"lap {result.laps}: {result.exact} exact, {killed} kills, {len(result.faults)} faults")
        if time.monotonic() > one.until or len(result.faults) > 20:
            return result
