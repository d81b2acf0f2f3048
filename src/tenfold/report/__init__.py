"""Write one self-contained HTML page about a run: what was saved, and how that was measured."""

from tenfold.report.page import write_report

__all__ = ["write_report"]
