"""The picture of a run: loss and accuracy over epochs, from its records."""

from pathlib import Path

from dropkey.metrics import Metric


def draw(records: list[dict], title: str, path: Path, split: str, metric: Metric) -> None:
    """Writes a PNG with training and evaluation loss (left) and the watched metric (right) over epochs."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    epochs = [r for r in records if r["kind"] == "epoch"]
    evaluated = [r for r in epochs if f"eval_{metric.key}" in r]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    left.plot([r["epoch"] for r in epochs], [r["train_loss"] for r in epochs], color="#4477aa", label="training")
    if evaluated:
        numbers = [r["epoch"] for r in evaluated]
        left.plot(numbers, [r.get("eval_loss") for r in evaluated], color="#ee6677", label=split)
        right.plot(numbers, [r[f"eval_{metric.key}"] for r in evaluated], color="#ee6677")
        best = (max if metric.higher_is_better else min)(evaluated, key=lambda r: r[f"eval_{metric.key}"])
        right.plot(best["epoch"], best[f"eval_{metric.key}"], "o", color="#ee6677", markersize=4)
        last = evaluated[-1][f"eval_{metric.key}"]
        right.set_title(f"last {last:.2f} %, best {best['eval_top1']:.2f} % (epoch {best['epoch']})", fontsize=9)
    left.set(xlabel="epoch", ylabel="loss")
    left.set_title(title, fontsize=9, loc="left")
    left.legend(frameon=False, fontsize=8)
    right.set(
        xlabel="epoch", ylabel=f"{metric.label} on the {split} split" + (f" ({metric.unit})" if metric.unit else "")
    )
    for axis in (left, right):
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=130, format="png")
    plt.close(figure)
    temporary.replace(path)
