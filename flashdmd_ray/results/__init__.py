"""Results of a run for people and programs: evaluation, report, grids, export. Nothing is trained here."""
