"""The fault run: producers and workers are busy, something breaks, and a ledger tells whether a task was lost."""
