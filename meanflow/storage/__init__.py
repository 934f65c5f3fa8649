"""What lies on disk: checkpoints, records beside results, and the files of others."""
