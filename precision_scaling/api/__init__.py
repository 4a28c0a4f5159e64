"""The project from Python: what `import precision_scaling as ps` offers. Above all rooms, as the commands are."""
