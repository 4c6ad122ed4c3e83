"""Mixtures of experts: who gets which token, the experts themselves, and the layer of both."""
