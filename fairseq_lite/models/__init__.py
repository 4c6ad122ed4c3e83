"""Architectures. `api` is the contract, `transformer` the model. Import the module you need."""
