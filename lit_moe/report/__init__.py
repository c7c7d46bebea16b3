"""Report: what one run did to a model, as JSON, Markdown, figures and a terminal table."""

from lit_moe.report.figures import draw_figures as draw_figures
from lit_moe.report.files import read_json as read_json
from lit_moe.report.files import write_json as write_json
from lit_moe.report.files import write_markdown as write_markdown
from lit_moe.report.markdown import to_markdown as to_markdown
from lit_moe.report.schema import Calibration as Calibration
from lit_moe.report.schema import Change as Change
from lit_moe.report.schema import Export as Export
from lit_moe.report.schema import LayerExperts as LayerExperts
from lit_moe.report.schema import RoundReport as RoundReport
from lit_moe.report.schema import RunReport as RunReport
from lit_moe.report.schema import installed_versions as installed_versions
from lit_moe.report.table import summary_table as summary_table
