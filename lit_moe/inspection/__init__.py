"""Inspection: what a checkpoint is made of, from its config alone."""

from lit_moe.inspection.describe import inspect_model as inspect_model
from lit_moe.inspection.findings import Inspection as Inspection
from lit_moe.inspection.findings import Layer as Layer
from lit_moe.inspection.findings import RefitNeeds as RefitNeeds
from lit_moe.inspection.findings import RefitRequest as RefitRequest
from lit_moe.inspection.findings import Saving as Saving
from lit_moe.inspection.findings import Size as Size
from lit_moe.inspection.findings import nearest as nearest
from lit_moe.inspection.ranks import Held as Held
from lit_moe.inspection.ranks import Loading as Loading
from lit_moe.inspection.ranks import RankNeeds as RankNeeds
from lit_moe.inspection.ranks import RankRequest as RankRequest
from lit_moe.inspection.ranks import Training as Training
from lit_moe.inspection.render import render as render
