"""Networks and layers that are not a paper's own, and the forms in which weights are stored."""
