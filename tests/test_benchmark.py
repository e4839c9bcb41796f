"""scripts/benchmark.py measures, writes and draws; the documentation shows its results."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from benchmarks.rivals import flex_row_keys, flex_score_mod
from benchmarks.show import summary
from data_samples import write_images
from dropkey import attention
from dropkey.errors import ConfigError

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture
def benchmark(monkeypatch):
    """The script, at sizes that take no time."""
    spec = importlib.util.spec_from_file_location("benchmark", ROOT / "scripts" / "benchmark.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "SHAPES", {"cpu": [(2, 2, 5, 8), (1, 2, 9, 8)]})
    monkeypatch.setattr(module, "STRUCTURED_SHAPE", (1, 2, 65, 8))
    monkeypatch.setattr(module, "GRID", (8, 8))
    monkeypatch.setattr(module, "BATCH", {"cpu": 2})
    module.MODELS["cpu"] |= {"depth": 1}
    monkeypatch.setattr(module, "LOOPS", {"cpu": [(module.MODELS["cpu"], 2, 2, False)]})
    return module


def test_decoders_are_compared_and_cores_counted(benchmark, tmp_path, monkeypatch, capsys):
    write_images(tmp_path / "photographs", 2, (300, 260), suffix=".jpg")
    monkeypatch.setattr("benchmarks.decoding.needs", lambda speed: [{"cores": round(1e5 / speed)}])
    benchmark.main(["decoding", f"root={tmp_path}", "rounds=2", f"output={tmp_path}"])
    result = json.loads((tmp_path / "decoding-cpu.json").read_text())
    assert {"Pillow", "torchvision"} <= {row["decoder"] for row in result["rows"]}
    assert all(row["crop"] > 0 for row in result["rows"]) and result["needs"][0]["cores"] > 0
    assert "Pillow, draft mode" in capsys.readouterr().out


@pytest.mark.parametrize("what", ["attention", "regularizers", "step", "training"])
def test_it_writes_a_table_a_file_and_a_picture(benchmark, what, tmp_path, capsys):
    benchmark.main([what, "device=cpu", "rounds=2", f"output={tmp_path}"])
    result = json.loads((tmp_path / f"{what}-cpu.json").read_text())
    assert torch.__version__.startswith(result["versions"]["torch"])
    assert not [row for row in result["rows"] if "failed" in row]
    assert result["rows"][0]["ratio"] == 1.0
    assert all(row["ms"] > 0 for row in result["rows"])
    assert (tmp_path / f"{what}-cpu.png").stat().st_size > 10_000
    shown = capsys.readouterr().out
    assert all(row["way"] in shown for row in result["rows"])


def test_dropkey_is_as_exact_as_plain_attention(benchmark):
    rows = benchmark.attention(torch.device("cpu"), rounds=2)
    off = [max(row["error"].values()) for row in rows if row["dtype"] == "float32" and "error" in row]
    assert len(off) == 6  # plain, cpu and sdpa at two shapes
    assert max(off) < 1e-5


def test_the_loops_train_the_model_that_is_named(benchmark):
    from benchmarks import loops

    cfg = loops.config(
        {"model_name": "vit_tiny_patch16_224", "img_size": 32, "patch_size": 4, "num_classes": 10},
        *(2, 2, "none", torch.device("cpu"), False),
    )
    model = cfg.model
    assert (model.name, model.patch_size) == ("vit_tiny_patch16_224", 4)
    assert model.depth is model.embed_dim is model.num_heads is model.mlp_ratio is None


def test_a_way_that_fails_gives_its_reason_and_the_others_go_on(benchmark):
    def broken():
        raise RuntimeError("no kernel image\nand more")

    plain, other = benchmark.measure({"plain": lambda: None, "broken": broken}, "plain", 3, torch.device("cpu"))
    assert plain["ratio"] == 1.0
    assert other == {"way": "broken", "failed": "RuntimeError: no kernel image"}


def test_memory_counts_what_is_kept_for_the_backward(benchmark):
    x = torch.randn(1024, requires_grad=True)
    assert benchmark.memory(lambda: x.exp(), [x], torch.ones(1024)) == 4096
    assert benchmark.memory(lambda: x * 2, [x], torch.ones(1024)) == 0


@pytest.mark.parametrize("words", [["attention", "device=cuda"], ["tune", "device=cpu"]])
def test_what_cannot_be_measured_here_ends_in_a_line(benchmark, words):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ConfigError, match="use device="):
        benchmark.main(words)


TIMINGS = sorted(file for file in RESULTS.glob("*.json") if file.stem not in ("simulated-tables", "decoding-cpu"))


@pytest.mark.parametrize("file", TIMINGS, ids=lambda file: file.stem)
def test_committed_results_have_their_hardware_and_versions(file):
    result = json.loads(file.read_text())
    assert {"hardware", "threads", "rounds", "versions", "commit"} <= result.keys()
    assert result["rounds"] >= 5


def test_the_documentation_shows_what_was_measured():
    rows = json.loads((RESULTS / "attention-cpu.json").read_text())["rows"]
    assert summary(rows, ("float32",)) in (ROOT / "docs" / "operator.md").read_text()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_drops_the_same_keys(benchmark):
    """Forward and not compiled: on a CPU it has no backward pass."""
    from torch.nn.attention.flex_attention import flex_attention

    tensors, seed = [torch.randn(2, 3, 16, 8) for _ in range(3)], torch.tensor(7)
    score_mod = flex_score_mod(flex_row_keys(tensors[0], seed), heads=3, queries=16)
    wanted = attention(*tensors, ratio=benchmark.RATIO, seed=seed, impl="reference")
    torch.testing.assert_close(flex_attention(*tensors, score_mod=score_mod), wanted, rtol=1e-4, atol=1e-5)
