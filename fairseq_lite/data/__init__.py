"""Dictionaries, indexed files, batches and iterators. Import the module you need."""
