"""Comparisons that anyone can run.

A package, and not a mere folder: fairscale installs one of the same name, which would come first.
"""
