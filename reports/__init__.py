"""Evaluation of run directories: states, scores, comparisons, studies, report pages."""
