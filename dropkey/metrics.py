"""What a task measures: the names, units and directions that curves, summaries and tables show."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """One figure of an evaluation.

    Attributes:
        key: its name in summary.json, and with `eval_` before it in metrics.jsonl.
        label: its name for people.
        unit: such as "%"; empty for a plain number.
        digits: decimals shown.
        higher_is_better: the direction of the best checkpoint and of a table's claims.
        proportion: the percentage of samples that are right; reports then show its binomial standard error.
    """

    key: str
    label: str
    unit: str = ""
    digits: int = 2
    higher_is_better: bool = True
    proportion: bool = False

    def format(self, value: float) -> str:
        """Label, value and unit, such as: loss 0.1234"""
        return f"{self.label} {value:.{self.digits}f}" + (f" {self.unit}" if self.unit else "")

    def better(self, value: float, than: float) -> bool:
        """Every number is better than nan."""
        if math.isnan(than):
            return not math.isnan(value)
        return value > than if self.higher_is_better else value < than
