"""Calibrate a graph. `calibrate` is the step; the other modules are its parts.

`images` reads the calibration set, `ranges` counts values and estimates ranges, `noise` measures the noise that a choice
leaves, and `choose` compares choices by it.
"""
