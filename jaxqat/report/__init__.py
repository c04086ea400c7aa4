"""One self-contained page per run, drawn from the run folder alone."""

from jaxqat.report.files import ReportError
from jaxqat.report.html import write_report
from jaxqat.report.samples import write_samples

__all__ = ["ReportError", "write_report", "write_samples"]
