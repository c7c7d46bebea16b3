"""Decisions for dropping: scores and a budget become a keep plan."""

from lit_moe.selection.budget import Budget as Budget
from lit_moe.selection.budget import ModelBytes as ModelBytes
from lit_moe.selection.budget import measure_bytes as measure_bytes
from lit_moe.selection.budget import parse_bytes as parse_bytes
from lit_moe.selection.counts import LayerRule as LayerRule
from lit_moe.selection.counts import check_budget as check_budget
from lit_moe.selection.counts import layer_counts as layer_counts
from lit_moe.selection.counts import layer_rules as layer_rules
from lit_moe.selection.protection import as_patterns as as_patterns
from lit_moe.selection.protection import find_super_experts as find_super_experts
from lit_moe.selection.protection import parse_protection as parse_protection
from lit_moe.selection.ranking import keep_top_overall as keep_top_overall
from lit_moe.selection.ranking import keep_top_per_group as keep_top_per_group
from lit_moe.selection.ranking import keep_top_per_layer as keep_top_per_layer
from lit_moe.selection.ranking import select as select
