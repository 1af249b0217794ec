"""What a run leaves for people: evaluation, export, report, grids."""
