"""Carrying the trainer's weights to the engines: a base class, one file for each way, and the check afterwards."""
