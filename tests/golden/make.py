"""Writes what tests compare with: python tests/golden/make.py losses|table|report

losses   losses.json: the first 20 training losses under each regularizer
table    table/records.jsonl: a mini-sweep of some twenty runs, two minutes; then its report
report   table/report.* and pictures, from table/records.jsonl
"""

import json
import os
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
os.environ["OMP_NUM_THREADS"] = "1"  # as the tests have it: sums come out the same
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]

import runs  # noqa: E402
from dropkey import session  # noqa: E402
from dropkey.analysis import entropy  # noqa: E402
from dropkey.config.check import check  # noqa: E402
from dropkey.config.compose import compose  # noqa: E402
from dropkey.config.schema import REGULARIZER_NAMES  # noqa: E402
from dropkey.records import RunDirectory  # noqa: E402
from dropkey.reproduction import jobs, record_file, results, tables, tuning, versions  # noqa: E402
from dropkey.reproduction.comparison import compare  # noqa: E402
from dropkey.reproduction.report import write  # noqa: E402

TABLE = HERE / "table"
FILE = TABLE / "records.jsonl"


def losses(output: Path, kind: str) -> list[float]:
    words = (f"regularizer={kind}", "regularizer.ratio=0.3", "trainer.epochs=7", "trainer.max_steps=20")
    return [record["loss"] for record in runs.train(output, *words).records("step")]


def all_losses() -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = {kind: losses(Path(folder), kind) for kind in REGULARIZER_NAMES}
    (HERE / "losses.json").write_text(json.dumps(found, indent=1) + "\n")


def table() -> None:
    mini = tables.load(str(TABLE / "mini.yaml"), "smoke")
    with tempfile.TemporaryDirectory() as folder:
        for job in tuning.jobs_of(mini, folder).values():
            session.train(check(compose(list(job.overrides))), RunDirectory(job.run))
        tuned = tuning.gather(mini, folder, [])
        mini = tuning.with_choices(mini, tuned)
        todo = jobs.jobs_of(mini, folder)
        for job in jobs.distinct(todo):
            session.train(check(compose(list(job.overrides))), RunDirectory(job.run))
            entropy.record_entropy(job.run)
        last = RunDirectory(todo["DropKey, constant", "ViT 2 x 32", 2].run)
        last.set_status("diverged", reason="loss nan")  # made up: no run of this size diverges
        record_file.write(FILE, *results.gather(mini, todo, tuned))
    report()


def report() -> None:
    mini = tables.load(str(TABLE / "mini.yaml"), "smoke")
    mini, head, found = results.read(FILE, mini)
    write(compare(mini, head, found, versions.require_one_version(head, found, mixed=False)), TABLE)


if __name__ == "__main__":
    {"losses": all_losses, "table": table, "report": report}[sys.argv[1]]()
