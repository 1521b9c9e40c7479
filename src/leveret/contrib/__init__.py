"""Leveret in other frameworks: a package each, with an extra of its own, imported by its users alone."""
