"""Processes as /proc shows them: a command's descendants, their memory and their open files."""

import contextlib
import os
import signal
import statistics
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Stat:
    parent: int
    state: str
    began: int  # tells a process from a later one with its id


def stat(pid: int) -> Stat | None:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return Stat(int(fields[1]), fields[0], int(fields[19]))


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


@dataclass
class Sample:
    second: float
    mib: float  # resident
    handles: int


@dataclass
class Growth:
    """From the first to the last fifth of a stretch: medians, the largest of all processes."""

    seconds: float = 0.0
    mib: float = 0.0
    handles: float = 0.0
    most_mib: float = 0.0

    @staticmethod
    def of(samples: list[Sample]) -> "Growth":
        fifth = len(samples) // 5
        if fifth < 2:
            return Growth()

        def grown(name: str) -> float:
            values = [getattr(one, name) for one in samples]
            return statistics.median(values[-fifth:]) - statistics.median(values[:fifth])

        most = max(one.mib for one in samples)
        return Growth(samples[-1].second - samples[0].second, grown("mib"), grown("handles"), most)


@dataclass
class Family:
    """A process and all its descendants, also those that outlive it. A thread looks at them every `period` seconds."""

    root: int
    period: float = 0.25
    members: dict[int, int] = field(default_factory=dict)  # id -> began
    samples: dict[int, list[Sample]] = field(default_factory=dict)
    ended: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> "Family":
        self.look()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, kind, *_) -> None:
        self.ended.set()
        self.thread.join()
        if kind is not None:  # Ctrl-C, say: nothing goes on by itself
            self.signal(signal.SIGKILL, self.alive())

    def watch(self) -> None:
        while not self.ended.wait(self.period):
            self.look()

    def look(self) -> None:
        seen = {int(p.name): one for p in Path("/proc").iterdir() if p.name.isdigit() and (one := stat(int(p.name)))}
        if self.root in seen:
            self.members.setdefault(self.root, seen[self.root].began)
        grown = True
        while grown:
            new = {
                pid: one.began
                for pid, one in seen.items()
                if pid not in self.members and self.is_member(one.parent, seen)
            }
            self.members.update(new)
            grown = bool(new)
        for pid in self.alive():
            self.sample(pid)

    def is_member(self, pid: int, seen: dict[int, Stat]) -> bool:
        return pid in seen and self.members.get(pid) == seen[pid].began

    def sample(self, pid: int) -> None:
        try:
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            handles = len(os.listdir(f"/proc/{pid}/fd"))
        except OSError:  # it just ended
            return
        self.samples.setdefault(pid, []).append(Sample(time.monotonic(), pages * PAGE / 2**20, handles))

    def alive(self) -> list[int]:
        found = {pid: stat(pid) for pid in list(self.members)}
        return [pid for pid, one in found.items() if one and one.began == self.members[pid] and one.state not in "ZX"]

    def children(self) -> list[int]:
        """Of the root, oldest first, without Python's own helpers."""
        own = [pid for pid in self.alive() if (one := stat(pid)) and one.parent == self.root]
        return sorted(pid for pid in own if "resource_tracker" not in command_line(pid))

    def wait_until_gone(self, seconds: float) -> list[int]:
        """Who is still there after that time."""
        until = time.monotonic() + seconds
        while self.alive() and time.monotonic() < until:
            time.sleep(0.1)
            self.look()
        return self.alive()

    def signal(self, number: int, pids: list[int]) -> None:
        for pid in pids:
            if pid in self.alive():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)

    def growth(self, since: float) -> Growth:
        """Of the processes that have lived through most of the time since `since`."""
        samples = [[one for one in found if one.second >= since] for found in list(self.samples.values())]
        grown = [Growth.of(one) for one in samples]
        longest = max((one.seconds for one in grown), default=0.0)
        rest = [one for one in grown if one.seconds > longest / 2] or [Growth()]
        return Growth(longest, *(max(getattr(one, name) for one in rest) for name in ("mib", "handles", "most_mib")))
