"""The claims of Scaling Laws for Precision put to a table, one module a claim."""
