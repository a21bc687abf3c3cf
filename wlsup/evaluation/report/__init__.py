"""The report: finished runs in, one self-contained HTML file out, and its figures for a paper."""
