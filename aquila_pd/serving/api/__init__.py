"""One endpoint a module."""
