"""Devices, compilation, processes, signals and hangs: what a run needs from the machine."""
