"""Leveret beside its peers, on the same broker in turn. `make bench` runs it; see docs/performance.md."""
