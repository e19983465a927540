"""datamodules: prepared token files -> batches with their noise. Called by train; prepare runs on its own."""
