"""Tasks: named inference endpoints. ``bind.py`` makes of a task what runs it; one file for each way of running."""
