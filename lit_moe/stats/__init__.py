"""Calibration: the only place that observes a forward pass."""

from lit_moe.stats.observation import LayerStats as LayerStats
from lit_moe.stats.observation import Observation as Observation
from lit_moe.stats.observe import observe as observe
