"""Decides which experts are merged, and with which coefficients."""

from lit_moe.grouping.align import align_ as align_
from lit_moe.grouping.api import decide as decide
from lit_moe.grouping.coefficients import Coefficients as Coefficients
from lit_moe.grouping.coefficients import Router as Router
from lit_moe.grouping.decision import Decision as Decision
from lit_moe.grouping.decision import apply as apply
from lit_moe.grouping.decision import layer_merge as layer_merge
from lit_moe.grouping.decision import report_of as report_of
from lit_moe.grouping.learned import LearnOptions as LearnOptions
from lit_moe.grouping.options import Align as Align
from lit_moe.grouping.options import MergeOptions as MergeOptions
from lit_moe.grouping.partition import Partition as Partition
from lit_moe.grouping.partition import partition as partition
from lit_moe.grouping.report import LayerMerge as LayerMerge
from lit_moe.grouping.report import MergeReport as MergeReport
from lit_moe.grouping.segments import SegmentOptions as SegmentOptions
from lit_moe.grouping.similarity import Similarity as Similarity
from lit_moe.grouping.similarity import available as available
from lit_moe.grouping.similarity import register as register
