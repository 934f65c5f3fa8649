"""Files on disk: checkpoints, records beside results, and the files of other projects."""
