"""The runner, resuming, and the contents and names of checkpoints."""
