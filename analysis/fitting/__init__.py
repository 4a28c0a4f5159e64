"""Fitting: from a law and a table to constants with intervals, held-out errors, and predictions."""
