"""The metrics that ship."""
