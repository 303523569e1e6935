"""How good a model is, and how far to trust the number: tests, judges, intervals, reports."""
