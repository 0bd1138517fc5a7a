"""One graph that drops tokens inside itself, run on one sequence at a time, and the runner that needs no torch."""
