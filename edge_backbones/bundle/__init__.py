"""The bundle on disk: its format, its readers and writers, and who signed it."""
