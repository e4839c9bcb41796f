"""The table of faults counts what was injected and survived, and forgets no case."""

import re
from pathlib import Path

import pytest

from fault_table import CASES

TESTS = Path(__file__).parent
pytest_plugins = ["pytester"]


def test_every_case_has_a_test():
    texts = [path.read_text() for path in TESTS.glob("test_*.py") if path.name != Path(__file__).name]
    marked = {
        int(case)
        for text in texts
        for cases in re.findall(r"mark\.fault\(([\d, ]+)", text)
        for case in re.findall(r"\d+", cases)
    }
    assert marked == set(CASES) == set(range(1, 29))


def table_of(pytester, body: str, *words: str) -> tuple[int, str]:
    """Exit code and output of `make faults` on these tests."""
    pytester.makepyfile(f"import pytest\n{body}")
    pytester.syspathinsert(TESTS)
    done = pytester.runpytest_inprocess("-p", "fault_table", "-m", "fault", *words)
    return done.ret, done.stdout.str()


SURVIVED = """
@pytest.mark.fault(10)
def test_kills(figure, every_fault):
    figure("oldest checkpoint: 1 interval", injected=100 if every_fault else 5)

@pytest.mark.fault(10, 12, full=True)
def test_more(figure):
    figure("and more", injected=7)
"""


def test_a_sample_is_counted_without_what_takes_minutes(pytester):
    code, text = table_of(pytester, SURVIVED)
    assert code == 0 and "not injected in this run: 1, 2," in text
    assert re.search(r"10 SIGKILL around saves +5 +5  oldest checkpoint: 1 interval$", text, re.M)


def test_all_faults_are_counted_and_a_case_without_one_fails_the_run(pytester):
    code, text = table_of(pytester, SURVIVED, "--every-fault")
    assert code == 1
    assert re.search(r"10 SIGKILL around saves +107 +107  oldest checkpoint: 1 interval; and more$", text, re.M)


@pytest.mark.parametrize(
    "end", ["figure(injected=9, survived=8); assert False", "assert False", "figure(injected=9); 1 / 0"]
)
def test_a_fault_that_is_not_survived_is_lost(pytester, end):
    code, text = table_of(pytester, f"@pytest.mark.fault(11)\ndef test_disk(figure):\n    {end}\n")
    injected, survived = map(int, re.search(r"11 disk full in a save +(\d) +(\d) .*LOST", text).groups())
    assert code == 1 and survived == injected - 1


def test_a_skipped_fault_says_why_and_counts_for_nothing(pytester):
    code, text = table_of(
        pytester, "@pytest.mark.fault(11)\ndef test_disk():\n    pytest.skip('only root may mount')\n"
    )
    assert code == 0 and "test_disk: only root may mount" in text and "disk full" not in text


def test_a_number_that_is_no_case_is_refused(pytester):
    code, text = table_of(pytester, "@pytest.mark.fault(29)\ndef test_it():\n    pass\n")
    assert code != 0 and "fault(29,) is none of 1..28" in text
