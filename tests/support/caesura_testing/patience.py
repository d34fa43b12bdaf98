"""How patient tests are; the conformance suites, which are shipped, have the same patience."""

from caesura.conformance.patience import FACTOR, VARIABLE, factor_from, patient

__all__ = ["FACTOR", "VARIABLE", "factor_from", "patient"]
