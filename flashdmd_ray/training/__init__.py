"""Joint training as a job: command line, attempts, observers of the loop, checkpoints."""
