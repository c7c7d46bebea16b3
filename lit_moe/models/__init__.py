"""Model builders: from a checkpoint, from an architecture, from another model."""

from lit_moe.models.causal_lm import DType as DType
from lit_moe.models.causal_lm import build_model as build_model
from lit_moe.models.causal_lm import check_vocabulary as check_vocabulary
from lit_moe.models.causal_lm import checkpoint_dtype as checkpoint_dtype
from lit_moe.models.causal_lm import frozen_copy as frozen_copy
