"""Models: what answers requests to score and to generate."""
