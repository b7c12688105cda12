"""One HTML page that tells what a run has come to, for people and without a network."""

from detection.report.write import write_report

__all__ = ["write_report"]
