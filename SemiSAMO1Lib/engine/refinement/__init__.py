"""Better pseudo-labels between rounds."""

from .refine import Refinement, refine_cohort, write_pseudo_label

__all__ = ["Refinement", "refine_cohort", "write_pseudo_label"]
