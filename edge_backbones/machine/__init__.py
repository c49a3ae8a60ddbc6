"""The machine that this process runs on: its GPUs, its files, its device profile, and processes of its own."""
