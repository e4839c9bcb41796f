"""Small runs of the interaction task, here and in the processes of a job: canvases of 24 pixels, few to evaluate."""

import distributed_run
from dropkey.datasets import digit_scenes

WORDS = (
    *("task=interaction", "model=qpic_digits", "data=digit_pairs", "model.pretrained=false", "data.image_size=24"),
    *("optim.clip_grad_norm=1.0", "optim.lr=1e-3", "trainer.epochs=2", "data.max_train_samples=48"),
)  # 3 steps per epoch
HELD_OUT = 13  # divides by no number of processes


def main(output: str, overrides: tuple[str, ...]) -> None:
    digit_scenes.HELD_OUT = HELD_OUT
    distributed_run.main(output, (*WORDS, *overrides))
