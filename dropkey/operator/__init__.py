"""How regularized attention is computed."""

from dropkey.operator.api import attention, select_impl

__all__ = ["attention", "select_impl"]
