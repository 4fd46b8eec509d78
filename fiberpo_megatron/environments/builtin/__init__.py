"""This package holds the environments that come with the program, one module for each short name of `use`."""
