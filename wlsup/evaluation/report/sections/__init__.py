"""The report's sections, one file a subject: groups of runs in, blocks of a page out."""
