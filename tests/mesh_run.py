"""Small runs of mesh recovery, here and in the processes of a job: figures of 32 pixels, few to evaluate."""

import distributed_run
from dropkey.datasets import stick_figures

WORDS = (
    *("task=mesh", "model=metro_figures", "data=stick_figures", "model.embed_dim=null", "model.depth=1"),
    *("data.image_size=32", "data.max_train_samples=48", "optim.clip_grad_norm=1.0", "optim.lr=1e-3"),
    "trainer.epochs=2",
)  # 3 steps per epoch
HELD_OUT = 13  # divides by no number of processes


def main(output: str, overrides: tuple[str, ...]) -> None:
    stick_figures.HELD_OUT = HELD_OUT
    distributed_run.main(output, (*WORDS, *overrides))
