"""Checkpoints: names and retention, safe storage, fairseq's files, and what a run restores."""
