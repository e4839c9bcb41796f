"""How regularized attention is computed."""

from dropkey.operator.api import attention, choose

__all__ = ["attention", "choose"]
