"""What a stage trains, by paper: each task is named by its `_target_` in an experiment."""
