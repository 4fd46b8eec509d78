"""This package is the command line."""
