"""Reprogramming: a frozen vision network made to do another task by what is put in front of it, and nothing else."""
