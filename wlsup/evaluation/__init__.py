"""Judging an encoder from the outside: features, k-NN, retrieval, statistics and the tables people read."""
