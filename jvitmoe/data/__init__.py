"""Where images come from, how they are batched, and how they are augmented."""
