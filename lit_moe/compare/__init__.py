"""Criteria, ratios and procedures side by side on one model, and what single experts are worth."""

from lit_moe.compare.ablation import AblationMap as AblationMap
from lit_moe.compare.ablation import ablation_map as ablation_map
from lit_moe.compare.ablation import stand_outs as stand_outs
