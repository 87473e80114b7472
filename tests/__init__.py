"""Tests, and the programs beside them: `python -m tests.soak`, `python -m tests.benchmarks`."""
