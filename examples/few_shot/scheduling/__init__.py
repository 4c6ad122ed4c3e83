"""Hundreds of evaluations as jobs, on this machine or on Slurm."""
