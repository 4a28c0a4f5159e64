"""A study: runs trained, quantized and evaluated in a workdir, and the table of their losses."""
