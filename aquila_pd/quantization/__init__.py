"""Weights stored in few bits inside a built model; files never know."""
