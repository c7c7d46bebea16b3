"""Scores: what says that an expert matters. Importing a file here is what registers it."""

from lit_moe.criteria import activation as activation
from lit_moe.criteria import chance as chance
from lit_moe.criteria import mc_activations as mc_activations
from lit_moe.criteria import mc_gradients as mc_gradients
from lit_moe.criteria import mc_inference as mc_inference
from lit_moe.criteria import mc_weights as mc_weights
from lit_moe.criteria import naee as naee
from lit_moe.criteria import obs as obs
from lit_moe.criteria import router_change as router_change
from lit_moe.criteria import usage as usage
from lit_moe.criteria import weights as weights
from lit_moe.criteria.base import Criterion as Criterion
from lit_moe.criteria.base import Evidence as Evidence
from lit_moe.criteria.base import GradientCriterion as GradientCriterion
from lit_moe.criteria.base import RoutedCriterion as RoutedCriterion
from lit_moe.criteria.registry import available as available
from lit_moe.criteria.registry import get_criterion as get_criterion
from lit_moe.criteria.registry import register as register
from lit_moe.criteria.scoring import score as score
from lit_moe.criteria.scoring import score_evidence as score_evidence
from lit_moe.criteria.unrouted import UnroutedRule as UnroutedRule
from lit_moe.criteria.unrouted import apply_unrouted as apply_unrouted
