"""Processes, and how one logical model is spread over them."""
