"""The parts of the stability comparison: runs, measures, tables, plots."""
