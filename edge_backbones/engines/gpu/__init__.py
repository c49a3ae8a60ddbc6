"""Manage memory, streams and arrays on a GPU, for every engine that runs there."""
