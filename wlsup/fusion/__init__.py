"""Fusion of two streams inside an encoder, attached from outside; one file a strategy: who attends to whom."""
