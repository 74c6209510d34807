"""Better pseudo-labels between rounds."""

from .refine import Refinement, refine_cohort

__all__ = ["Refinement", "refine_cohort"]
