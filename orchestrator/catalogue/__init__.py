"""What the owner writes: service.yaml and models.yaml, read into core models."""
