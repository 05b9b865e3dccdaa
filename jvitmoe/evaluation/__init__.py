"""Accuracy, NLL and calibration of the models of a run, and why averaging works or fails."""
