"""VOLO with MixToken: mixed in training, VOLO in evaluation, and a loss for each token."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import runs
from dropkey.config.check import check
from dropkey.config.compose import compose
from dropkey.errors import ConfigError, Interrupted
from dropkey.exporting import usage
from dropkey.models import create_model
from dropkey.models.mix_token import MixTokenVOLO
from dropkey.tasks.classification import mix_token_losses

MIXED = ("model=volo_d1", "model.args={use_aux_head: true, use_mix_token: true}", "data.image_size=32")


def volo(*words):
    cfg = check(compose([*MIXED, *words]))
    return create_model(cfg.model, image_size=32, channels=1, num_classes=10)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return volo()


def test_evaluation_is_that_of_volo(model):
    images = torch.randn(2, 1, 32, 32)
    plain = volo("model.args={use_aux_head: true, use_mix_token: false}")
    plain.load_state_dict(model.state_dict())
    assert type(plain) is not MixTokenVOLO
    assert torch.equal(model.eval()(images), plain.eval()(images))


def test_timm_alone_reads_what_is_exported_of_it(model):
    trained = SimpleNamespace(model=model, info={"architecture": "volo_d1_224", "model_args": {}})
    assert "import dropkey" not in "".join(usage(trained, "timm", Path("x")))


def test_training_gives_logits_of_images_and_tokens_and_the_share_that_was_not_mixed(model, monkeypatch):
    boxes, train = [], MixTokenVOLO.forward_train
    monkeypatch.setattr(MixTokenVOLO, "forward_train", lambda self, x: [out := train(self, x), boxes.append(out[2])][0])
    shares = set()
    for seed in range(6):
        torch.manual_seed(seed)
        logits, tokens, own = model.train()(torch.randn(2, 1, 32, 32))
        top, left, bottom, right = boxes[-1]
        assert logits.shape == (2, 10) and tokens.shape == (2, 16, 10)
        assert own == 1 - (bottom - top) * (right - left) / 16
        shares.add(own)
    assert len(shares) > 2 and all(0 <= own <= 1 for own in shares)


def test_without_a_box_the_network_is_that_of_volo(model, monkeypatch):
    monkeypatch.setattr("timm.models.volo.rand_bbox", lambda *args, **kwargs: (0, 0, 0, 0))
    images = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        for module in model.train().modules():
            module.training &= not isinstance(module, torch.nn.BatchNorm2d)
        logits, tokens, own = model(images)
        expected = model.eval()(images)
    assert own == 1
    torch.testing.assert_close(logits + 0.5 * tokens.max(1)[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("soft", [False, True])
def test_losses_are_those_of_a_loop_over_images_and_tokens(soft):
    logits, tokens, ids = torch.randn(4, 5), torch.randn(4, 6, 5), torch.tensor([0, 3, 1, 4])
    targets = F.one_hot(ids, 5) * 0.9 + 0.02
    targets = targets if soft else F.one_hot(ids, 5).float()
    expected = {"cross_entropy": 0.0, "token_cross_entropy": 0.0}
    for i in range(4):
        expected["cross_entropy"] += 0.7 * F.cross_entropy(logits[i], targets[i])
        expected["cross_entropy"] += 0.3 * F.cross_entropy(logits[i], targets[3 - i])
        for token in tokens[i]:
            expected["token_cross_entropy"] += 0.5 * F.cross_entropy(token, targets[i]) / 6
    found = mix_token_losses(logits, tokens, 0.7, targets if soft else ids)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value)


def test_a_run_trains_both_heads_and_resumes_bitwise(tiny_volo, tmp_path, monkeypatch):
    words = (
        *MIXED,
        "data.max_train_samples=20",
        "trainer.batch_size=4",
        "trainer.max_steps=2",
        "optim.warmup_epochs=0",
    )
    words = (*words, "model.depth=null", "model.embed_dim=null", "model.num_heads=null", "augment.label_smoothing=0.1")
    whole = runs.state(runs.train(tmp_path / "whole", *words))
    runs.on_step(monkeypatch, 1, runs.send())
    with pytest.raises(Interrupted):
        runs.train(tmp_path / "cut", *words)
    assert runs.unequal(whole, runs.state(runs.train(tmp_path / "cut", *words))) is None
    assert all(whole["optimizer"]["state"][key]["exp_avg"].any() for key in whole["optimizer"]["state"])


@pytest.mark.parametrize(
    "words", [("model=deit_tiny", "model.args.use_mix_token=true"), ("model=volo_d1", "model.args.use_mix_token=true")]
)
def test_mix_token_without_its_head_is_refused(words):
    with pytest.raises(ConfigError, match=r"model.args.use_mix_token: only VOLO has it, and with .*use_aux_head=true"):
        check(compose([*words, "data.image_size=32"]))
