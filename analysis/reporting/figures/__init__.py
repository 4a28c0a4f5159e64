"""Figures of a study: each drawn from the table of losses and the fits alone, or skipped with a stated reason."""
