"""The claims of Scaling Laws for Precision tested on a table, one module a claim."""
