"""Commands around a run: evaluate, export, prepare data, resize the pools of a running job."""
