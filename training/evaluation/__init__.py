"""How good a model is: judges, metrics, report."""
