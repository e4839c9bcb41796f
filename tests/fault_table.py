"""Counts, for each of 28 faults, how many were injected and survived, and prints them: `make faults`.

A test that injects one says which: `@pytest.mark.fault(10)`. Where it injects several, or has measured something, it
calls the fixture `figure`. What takes minutes has `full=True` and runs with `--every-fault` only.
"""

import collections
import textwrap

import pytest

CASES = {
    1: "interrupted, resumed: equal to the bit",
    2: "the stream of samples goes on",
    3: "raw weights, moving average",
    4: "learning rate of every step",
    5: "the best epoch stays the best",
    6: "no lost or repeated record",
    7: "config changed before resuming",
    8: "another number of processes",
    9: "finished run; missing path",
    10: "SIGKILL around saves",
    11: "disk full in a save",
    12: "checkpoint cut short, bit flipped",
    13: "code in a checkpoint",
    14: "best and last kept; failed delete",
    15: "SIGTERM, SIGUSR1, Ctrl-C",
    16: "a process raises or is killed",
    17: "torchrun starts again",
    18: "test images do not divide",
    19: "drop-path, unused parameters in DDP",
    20: "random numbers differ and repeat",
    21: "one directory per run",
    22: "loss or gradient not finite",
    23: "ratio 0, evaluation, no key left",
    24: "data set too small or unlike config",
    25: "unreadable image",
    26: "mistake in the config",
    27: "W&B is gone",
    28: "some runs of a sweep fail",
}


def pytest_addoption(parser) -> None:
    parser.addoption("--every-fault", action="store_true", help="inject all faults, not a sample of them; minutes")


def pytest_configure(config) -> None:
    line = "fault(*cases, full=False): injects these faults (see tests/fault_table.py); full: with --every-fault only"
    config.addinivalue_line("markers", line)
    config.pluginmanager.register(FaultTable(config), "faults injected")


@pytest.fixture
def every_fault(request) -> bool:
    return request.config.getoption("every_fault")


@pytest.fixture
def figure(request):
    """Notes what a test has injected, and what it found, for the table."""

    def note(text: str = "", *, injected: int = 1, survived: int | None = None) -> None:
        counts = {"injected": injected, "survived": injected if survived is None else survived}
        request.node.user_properties.append(("figure", {"text": text, **counts}))

    return note


class FaultTable:
    def __init__(self, config):
        self.config = config
        self.counts = {case: collections.Counter() for case in CASES}
        self.texts: dict[int, list[str]] = {case: [] for case in CASES}
        self.skipped: dict[int, list[str]] = {case: [] for case in CASES}

    def pytest_collection_modifyitems(self, config, items: list) -> None:
        """After it has chosen, each test carries its cases to where reports are counted, other processes included."""
        left_out = []
        for item in items:
            marks = list(item.iter_markers("fault"))
            if any(mark.kwargs.get("full") for mark in marks) and not config.getoption("every_fault"):
                left_out.append(item)
            elif cases := sorted({case for mark in marks for case in mark.args}):
                assert set(cases) <= set(CASES), f"{item.nodeid}: fault{tuple(cases)} is none of 1..28"
                item.user_properties.append(("faults", cases))
        if left_out:
            config.hook.pytest_deselected(items=left_out)
            items[:] = [item for item in items if item not in left_out]

    def pytest_runtest_logreport(self, report) -> None:
        found = collections.defaultdict(list)
        for name, value in report.user_properties:
            found[name].append(value)
        if "faults" not in found or (report.when != "call" and report.passed):
            return
        figures = found["figure"] or [{"text": "", "injected": 1, "survived": 1}]
        for case in found["faults"][0]:
            if report.skipped:
                self.skipped[case].append(f"{report.nodeid}: {report.longrepr[2].removeprefix('Skipped: ')}")
                continue
            injected, survived = (sum(one[key] for one in figures) for key in ("injected", "survived"))
            self.counts[case]["injected"] += injected
            self.counts[case]["survived"] += survived if report.passed else min(survived, injected - 1)
            self.texts[case] += [one["text"] for one in figures if one["text"] and one["text"] not in self.texts[case]]

    def asked_for(self) -> bool:
        return self.config.getoption("every_fault") or "fault" in self.config.getoption("markexpr")

    def untested(self) -> list[int]:
        """Where all faults were to be injected: the cases of which none was."""
        return [case for case in CASES if not self.counts[case]["injected"]] if self.asked_for() else []

    def pytest_sessionfinish(self, session) -> None:
        """A case without a test is a failure where all are asked for; one that says why it is skipped is none."""
        forgotten = [case for case in self.untested() if not self.skipped[case]]
        if session.exitstatus == pytest.ExitCode.OK and self.config.getoption("every_fault") and forgotten:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter) -> None:
        if not self.asked_for():
            return
        write = terminalreporter.write_line
        write(f"\n{'case':>4} {'':<38} {'injected':>8} {'survived':>8}  figure")
        for case, name in CASES.items():
            count = self.counts[case]
            if not count["injected"]:
                continue
            lines = textwrap.wrap("; ".join(self.texts[case]), 60) or [""]
            lost = count["survived"] < count["injected"]
            row = f"{case:>4} {name:<38} {count['injected']:>8,} {count['survived']:>8,}  {lines[0]}"
            write(row.rstrip() + ("  LOST" if lost else ""), red=lost)
            for line in lines[1:]:
                write(" " * 63 + line)
        totals = [sum(count[key] for count in self.counts.values()) for key in ("injected", "survived")]
        write(f"{'':>4} {'all':<38} {totals[0]:>8,} {totals[1]:>8,}")
        if self.untested():
            write(f"not injected in this run: {', '.join(map(str, self.untested()))}")
        for reason in dict.fromkeys(reason for reasons in self.skipped.values() for reason in reasons):
            write(f"skipped: {reason}")
