"""Reports: the facts of a measurement, and how they are shown."""
