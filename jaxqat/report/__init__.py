"""One self-contained page per run, drawn from the run folder alone."""

from jaxqat.report.html import write_report
from jaxqat.report.read import ReportError, write_samples

__all__ = ["ReportError", "write_report", "write_samples"]
