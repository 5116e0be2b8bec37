"""What is in the folder of a run."""
