"""Closed-form refit: repair without gradients, after any plan.

The package itself can be called: ``lit_moe.refit(student, teacher, batches)`` means
``lit_moe.refit.refit(student, teacher, batches)``.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from lit_moe.refit.api import OnLayer as OnLayer
from lit_moe.refit.api import check_budget as check_budget
from lit_moe.refit.api import refit as refit
from lit_moe.refit.options import RefitOptions as RefitOptions
from lit_moe.refit.relatives import check_expert_ids as check_expert_ids
from lit_moe.refit.relatives import check_relatives as check_relatives
from lit_moe.refit.relatives import check_sizes as check_sizes
from lit_moe.refit.relatives import is_unchanged as is_unchanged
from lit_moe.refit.report import LayerRefit as LayerRefit
from lit_moe.refit.report import RefitReport as RefitReport
from lit_moe.refit.rows import check_num_rows as check_num_rows


class _CallablePackage(ModuleType):
    """Python binds a subpackage to its parent's attribute, which is also the function's name."""

    def __call__(self, *args: Any, **kwargs: Any) -> RefitReport:
        return refit(*args, **kwargs)


sys.modules[__name__].__class__ = _CallablePackage
