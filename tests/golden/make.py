"""Writes losses.json, the first 20 training losses under each regularizer: python tests/golden/make.py"""

import json
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]

import runs  # noqa: E402
from dropkey.config.schema import KINDS  # noqa: E402


def losses(output: Path, kind: str) -> list[float]:
    words = (f"regularizer={kind}", "regularizer.ratio=0.3", "trainer.epochs=7", "trainer.max_steps=20")
    return [record["loss"] for record in runs.train(output, *words).records("step")]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        found = {kind: losses(Path(folder), kind) for kind in KINDS}
    (HERE / "losses.json").write_text(json.dumps(found, indent=1) + "\n")
