"""Training of the runs of a cohort, from batches to checkpoints."""
