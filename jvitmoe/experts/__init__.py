"""Trees of experts: the expert axis, merging, and what a model costs."""
