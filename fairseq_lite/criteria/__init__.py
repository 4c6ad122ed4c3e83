"""Losses. `api` is the contract. Import the module you need."""
