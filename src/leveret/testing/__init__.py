"""For people who build on Leveret: the checks that every broker passes (`leveret.testing.conformance`)."""
