"""A run of several stages in one folder: preflight, preparation, stages, processes, results."""
