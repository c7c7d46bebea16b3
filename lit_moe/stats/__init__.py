"""Calibration: the only place that observes a forward pass."""

from lit_moe.stats.gradient_stats import GradientObservation as GradientObservation
from lit_moe.stats.gradient_stats import GradientStats as GradientStats
from lit_moe.stats.gradients import observe_gradients as observe_gradients
from lit_moe.stats.observation import GATHERABLE as GATHERABLE
from lit_moe.stats.observation import Gathered as Gathered
from lit_moe.stats.observation import LayerStats as LayerStats
from lit_moe.stats.observation import Observation as Observation
from lit_moe.stats.observe import observe as observe
