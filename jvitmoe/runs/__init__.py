"""What a run keeps on disk and shows: folder, checkpoints, history, results, figures."""
