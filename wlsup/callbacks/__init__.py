"""Thin Lightning wrappers over `wlsup.evaluation`, and the keeping of a run's folder."""
