"""Every declared method on the experts of an experiment, beside what the papers report."""
