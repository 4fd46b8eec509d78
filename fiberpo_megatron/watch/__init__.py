"""This package serves a web page that follows runs from their folders alone, and writes nothing (docs/watch.md)."""
