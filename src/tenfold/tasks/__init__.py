"""Training: recipes, the engine's modules, and the verbs on runs. Needs Lightning."""
