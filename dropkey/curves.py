"""The picture of a run: loss and accuracy over epochs, from its records."""

from pathlib import Path


def draw(records: list[dict], title: str, path: Path, split: str = "validation") -> None:
    """Writes a PNG with training and evaluation loss (left) and top-1 in percent (right) over epochs."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    epochs = [r for r in records if r["kind"] == "epoch"]
    evaluated = [r for r in epochs if "eval_top1" in r]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    left.plot([r["epoch"] for r in epochs], [r["train_loss"] for r in epochs], color="#4477aa", label="training")
    if evaluated:
        numbers = [r["epoch"] for r in evaluated]
        left.plot(numbers, [r["eval_loss"] for r in evaluated], color="#ee6677", label=split)
        right.plot(numbers, [r["eval_top1"] for r in evaluated], color="#ee6677")
        best = max(evaluated, key=lambda r: r["eval_top1"])
        right.plot(best["epoch"], best["eval_top1"], "o", color="#ee6677", markersize=4)
        last = evaluated[-1]["eval_top1"]
        right.set_title(f"last {last:.2f} %, best {best['eval_top1']:.2f} % (epoch {best['epoch']})", fontsize=9)
    left.set(xlabel="epoch", ylabel="cross-entropy")
    left.set_title(title, fontsize=9, loc="left")
    left.legend(frameon=False, fontsize=8)
    right.set(xlabel="epoch", ylabel=f"top-1 on the {split} split (%)")
    for axis in (left, right):
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=130, format="png")
    plt.close(figure)
    temporary.replace(path)
