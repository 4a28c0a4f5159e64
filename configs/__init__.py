"""Experiment configurations: one ml_collections file per experiment, all derived from base.py."""
