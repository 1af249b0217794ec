"""A run's folder on disk, its tracking and progress, and what every command line shares."""
