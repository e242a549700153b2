"""A multi-stage run in one folder: preflight, preparation, stages, processes, results."""
