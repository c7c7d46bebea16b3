"""Weight sparsity: which single weights of the routed experts go, and how they stay away.

::

    masks = lit_moe.sparsity.weight_masks(model, batches, method="moe_pruner", pattern="2:4")
    lit_moe.sparsity.apply_masks(model, masks)
"""

from lit_moe.sparsity.api import Thinning as Thinning
from lit_moe.sparsity.api import apply_masks as apply_masks
from lit_moe.sparsity.api import check_request as check_request
from lit_moe.sparsity.api import masks_from_moments as masks_from_moments
from lit_moe.sparsity.api import measure_sparsity as measure_sparsity
from lit_moe.sparsity.api import sparsify as sparsify
from lit_moe.sparsity.api import weight_masks as weight_masks
from lit_moe.sparsity.calibration import observe_inputs as observe_inputs
from lit_moe.sparsity.layout import parameter_zeros as parameter_zeros
from lit_moe.sparsity.layout import shapes_of as shapes_of
from lit_moe.sparsity.layout import zero_ as zero_
from lit_moe.sparsity.layout import zero_gradient as zero_gradient
from lit_moe.sparsity.masks import WeightMasks as WeightMasks
from lit_moe.sparsity.options import SparsityOptions as SparsityOptions
from lit_moe.sparsity.report import SparsityReport as SparsityReport
from lit_moe.sparsity.schedule import CubicSchedule as CubicSchedule
