"""Convergence studies: a grid of trainings, run to the end and compared. spec -> runner -> results -> report, plots."""
