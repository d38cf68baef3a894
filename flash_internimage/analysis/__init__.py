"""Reports on trained models of all three tasks, and charts that compare runs."""
