"""The process and the installed libraries: versions, MKL and malloc settings, PaddleNLP's Auto classes."""
