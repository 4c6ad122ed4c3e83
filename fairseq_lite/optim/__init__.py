"""Optimizers, learning-rate schedules and numeric precision."""
