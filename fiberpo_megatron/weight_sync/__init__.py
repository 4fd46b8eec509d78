"""This package carries the trainer's weights to the engines. It has a base class and one file for each way."""
