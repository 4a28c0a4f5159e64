"""From a table of measured losses to fitted precision-aware scaling laws, figures, a report and a plan."""
