"""The peers' programs, run with the interpreter in benchmarks/.peers. Nothing here imports Leveret."""
