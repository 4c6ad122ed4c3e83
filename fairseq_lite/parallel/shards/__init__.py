"""What each rank holds of a checkpoint, written and read at any number of ranks."""
