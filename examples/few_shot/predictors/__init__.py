"""Predictors: from samples and shots to predictions."""
