"""SemiSAMO1: one labelled volume in, a segmented cohort out."""

__version__ = "0.1.0"
