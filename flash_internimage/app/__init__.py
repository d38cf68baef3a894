"""A page in the browser that shows predictions of the three tasks, and sampling points."""
