"""The idea of this project: routes, slices of expert-stacked trees, merging, and what it costs. Read this first."""
