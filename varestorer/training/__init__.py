"""Training: one `fit` loop, one `Task` per stage, one `Checkpointer`, one `Run` folder.

`task` says what a stage is, `fit` trains it, `run` owns the folder it is written to, `checkpoint` is the
whole of resume. Nothing is imported here, so that `varestorer train --help` does not wait for torch.
"""
