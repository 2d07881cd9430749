"""The page of results, its plots, and the report of a run."""
