"""Self-contained HTML pages: the report of a run, the analysis of its layers, a comparison."""

from jaxqat.pipeline.report.analysis import write_analysis
from jaxqat.pipeline.report.comparison import write_comparison
from jaxqat.pipeline.report.files import ReportError
from jaxqat.pipeline.report.html import write_report
from jaxqat.pipeline.report.samples import choose_samples, write_samples

__all__ = [
    "ReportError",
    "choose_samples",
    "write_analysis",
    "write_comparison",
    "write_report",
    "write_samples",
]
