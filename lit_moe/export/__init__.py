"""Export: a smaller model as a Hugging Face folder that was checked before it got its name.

The package itself can be called: ``lit_moe.export(model, path)`` means ``export(model, path)``.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from lit_moe.checkpoints import load as load
from lit_moe.export.compressed import check_packable as check_packable
from lit_moe.export.compressed_reading import load_compressed as load_compressed
from lit_moe.export.exporter import ExportResult as ExportResult
from lit_moe.export.exporter import Layout as Layout
from lit_moe.export.exporter import Wanted as Wanted
from lit_moe.export.exporter import check_layout as check_layout
from lit_moe.export.exporter import export as export
from lit_moe.export.staging import check_target as check_target
from lit_moe.export.whole import selection_biases as selection_biases
from lit_moe.export.whole import whole_on_first_rank as whole_on_first_rank


class _CallablePackage(ModuleType):
    """Python binds a subpackage to its parent's attribute, which is also the function's name."""

    def __call__(self, *args: Any, **kwargs: Any) -> ExportResult:
        return export(*args, **kwargs)


sys.modules[__name__].__class__ = _CallablePackage
