"""Commands that are no job of their own: judge a data set, resize the pools of a running job."""
