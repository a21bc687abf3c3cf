"""Pictures of results, for papers: matplotlib, as PNG and SVG."""
