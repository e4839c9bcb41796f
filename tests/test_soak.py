"""What `make soak` judges by: it notices a process that is left, handles that grow and a bit that differs."""

import json
import shutil
import subprocess
import sys
import time

import torch

import runs
from dropkey.records import RunDirectory
from soak import training
from soak.watching import Family

GROWS = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
kept = []
for _ in range(12):
    kept.append((open("/dev/null"), bytearray(b"1") * 2**20))
    time.sleep(0.05)
"""


def test_a_family_sees_growth_and_who_outlives_its_root():
    process = subprocess.Popen([sys.executable, "-c", GROWS])
    with Family(process.pid, period=0.02) as family:
        began = time.monotonic()
        process.wait()
        grown = family.growth(began)
        (left,) = family.wait_until_gone(0.2)
        family.signal(9, [left])
        assert family.wait_until_gone(10) == []
    assert grown.handles >= 3 and grown.mib >= 2


def test_a_weight_a_record_a_figure_and_an_answer_that_differ_are_noticed(tmp_path):
    whole = runs.train(tmp_path / "whole", *runs.ONE_EPOCH, "trainer.ema_decay=0.9")

    def changed(change) -> str | None:
        shutil.rmtree(tmp_path / "parts", ignore_errors=True)
        run = RunDirectory(shutil.copytree(whole.path, tmp_path / "parts"))
        change(run)
        return training.unequal(whole, run)

    def weight(run):
        path = run.checkpoints / "last.pt"
        content = torch.load(path, weights_only=True)
        content["ema"]["head.bias"][0] += 1e-7
        torch.save(content, path)

    def record(run):
        run.metrics.write_text(run.metrics.read_text().replace('"epoch": 1', '"epoch": 2', 1))

    def figure(run):
        (run.path / "summary.json").write_text(json.dumps(run.summary() | {"top1": 0.0}))

    def answer(run):
        (run.path / "summary.bits").write_bytes(b"")

    found = [changed(change) for change in (lambda run: None, weight, record, figure, answer)]
    assert found == [None, "last.pt.ema.head.bias", "metrics.jsonl", "summary.json.top1", "summary.bits"]
