"""NF4 quantization of a built model; full-precision files are not affected."""
