"""These are the parts of the stability comparison: runs, measures, tables, plots."""
