"""What is claimed: statements, each with the difference that decides it."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.claims.grid import Row, row


@dataclass(frozen=True)
class Claim:
    """A statement, and the difference that decides it.

    Args:
        name: on the page.
        statement: in words.
        better, worse: rows whose AP is compared, seed by seed.
        least: how many AP the first has to be ahead at least.
        source: where the paper says so; empty where it does not.
    """

    name: str
    statement: str
    better: Row
    worse: Row
    least: float
    source: str

    @property
    def paper(self) -> float | None:
        """The paper's difference in AP."""
        if self.better.paper is None or self.worse.paper is None:
            return None
        return round(self.better.paper - self.worse.paper, 1)


def _claim(
    name: str, statement: str, table: str, better: str, worse: str, least: float = 0.0
) -> Claim:
    better_row, worse_row = row(table, better), row(table, worse)
    known = better_row.paper is not None and worse_row.paper is not None
    source = f"Table {table}" if known else ""
    return Claim(name, statement, better_row, worse_row, least, source)


CLAIMS = (
    _claim(
        "rag",
        "RAG(2) beats JFB by at least 1 AP",
        "4c",
        "RAG(2)",
        "RAG(1) = JFB",
        1.0,
    ),
    _claim(
        "rag-quiet",
        "RAG(2) beats JFB by at least 1 AP, both without perturbation",
        "4c",
        "RAG(2), no perturbation",
        "RAG(1) = JFB, no perturbation",
        1.0,
    ),
    _claim(
        "rap",
        "Multi-step perturbation brings at least 0.5 AP",
        "4e",
        "multi-step",
        "/",
        0.5,
    ),
    _claim(
        "deqdet-rnndet",
        "DEQDet is ahead of RNNDet with T = 6",
        "2",
        "DEQDet, NF = 25",
        "RNNDet, NF = 6",
    ),
    _claim(
        "deqdet-rnndet-6",
        "DEQDet with six refinements is ahead of RNNDet with T = 6",
        "2",
        "DEQDet, NF = 6",
        "RNNDet, NF = 6",
    ),
    _claim(
        "rnndet-adamixer",
        "RNNDet with T = 6 is ahead of AdaMixer",
        "2",
        "RNNDet, NF = 6",
        "AdaMixer, NF = 6",
    ),
    _claim(
        "deqdet-adamixer-6",
        "DEQDet with six refinements is ahead of AdaMixer",
        "2",
        "DEQDet, NF = 6",
        "AdaMixer, NF = 6",
    ),
    _claim(
        "more-refinements",
        "DEQDet is better with 25 refinements than with 6",
        "2",
        "DEQDet, NF = 25",
        "DEQDet, NF = 6",
    ),
    _claim(
        "rnndet-depth",
        "RNNDet with T = 20 falls behind T = 12",
        "2",
        "RNNDet, NF = 12",
        "RNNDet, NF = 20",
    ),
    _claim("init", "64 points in the initialisation layer beat none of its own", "4a", "64", "/"),
    _claim("extra", "Two extra supervised layers beat none", "4b", "2", "0"),
    _claim(
        "omega",
        "Positions with m = 4, C = 3 beat m = 3, C = 3",
        "4d",
        "m = 4, C = 3",
        "m = 3, C = 3",
    ),
    _claim("rap-zero", "Zero-step noise helps", "4e", "zero-step", "/"),
    _claim("rap-multi", "Multi-step noise beats one-step noise", "4e", "multi-step", "one-step"),
    _claim("noise-position", "Noise on positions alone helps", "4f", "0 / 25", "0 / 0"),
    _claim("noise-content", "Noise on contents alone helps", "4f", "0.1 / 0", "0 / 0"),
    _claim("noise-much", "Both noises at their largest are worse", "4g", "0.1 / 25", "0.2 / 50"),
    _claim("train-steps", "Training with T = 20 beats T = 15", "4h", "20", "15"),
    _claim(
        "neumann", "Neumann(2) loses at most 0.5 AP to RAG(2)", "4c", "Neumann(2)", "RAG(2)", -0.5
    ),
    _claim("bptt", "RAG(2) loses at most 0.5 AP to BPTT", "4c", "RAG(2)", "BPTT()", -0.5),
)
