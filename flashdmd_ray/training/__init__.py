"""Joint training as a job: command line, run, checkpoints."""
