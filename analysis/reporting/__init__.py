"""The report of a table: evidence, verdicts, figures, and the page."""
