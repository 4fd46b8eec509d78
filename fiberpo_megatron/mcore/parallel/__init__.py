"""The parallel layout: process groups, what a layout has to divide, messages between ranks, the heartbeat."""
