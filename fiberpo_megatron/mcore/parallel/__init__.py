"""This package holds the parallel layout: process groups, what a layout must divide, messages between ranks,
heartbeat."""
