"""The commands of the console program `flash-internimage`."""
