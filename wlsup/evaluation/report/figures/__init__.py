"""The report's figures: each drawn once, shown inline in the reader's colours, saved as PNG and SVG for a paper."""
