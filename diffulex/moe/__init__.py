"""Mixture-of-Experts layers and what model configs say about them."""
