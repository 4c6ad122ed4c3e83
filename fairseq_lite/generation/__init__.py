"""Search over outputs: strategies, the incremental decoder, the generator, what is printed."""
