"""How many bytes a model will need."""
