"""Lightning callbacks: when things happen. Imported as ``lit_moe.callbacks``."""

if __name__ != "lit_moe.callbacks":
    raise ImportError(
        "import lit_moe.callbacks, not callbacks: the top-level folder is only where the files lie"
    )

from lit_moe.callbacks.evolution import EvolutionarySearch as EvolutionarySearch
from lit_moe.callbacks.export import ExportModel as ExportModel
from lit_moe.callbacks.iterative import IterativePruning as IterativePruning
from lit_moe.callbacks.merge import ExpertMerging as ExpertMerging
from lit_moe.callbacks.monitor import ExpertMonitor as ExpertMonitor
from lit_moe.callbacks.one_shot import OneShotPruning as OneShotPruning
from lit_moe.callbacks.refit import Refit as Refit
from lit_moe.callbacks.report import ReportWriter as ReportWriter
from lit_moe.callbacks.router_norm import TwoPatternStudy as TwoPatternStudy
from lit_moe.callbacks.task_specific import TaskSpecificPruning as TaskSpecificPruning
from lit_moe.callbacks.weight_sparsity import WeightPruning as WeightPruning
