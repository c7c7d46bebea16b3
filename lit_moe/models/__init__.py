"""Model builders: from a checkpoint, from an architecture, from another model."""

from lit_moe.models.causal_lm import DType as DType
from lit_moe.models.causal_lm import build_model as build_model
from lit_moe.models.causal_lm import check_unwritten as check_unwritten
from lit_moe.models.causal_lm import check_vocabulary as check_vocabulary
from lit_moe.models.causal_lm import checkpoint_dtype as checkpoint_dtype
from lit_moe.models.causal_lm import frozen_copy as frozen_copy
from lit_moe.models.causal_lm import sharing_copy as sharing_copy
from lit_moe.models.smollm2 import smollm2_folder as smollm2_folder
from lit_moe.models.smollm2 import smollm2_split_folder as smollm2_split_folder
from lit_moe.models.splitting import split_dense as split_dense
