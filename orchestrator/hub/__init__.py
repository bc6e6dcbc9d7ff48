"""The model hub: what a repository has, which files make a model, and their way into the cache."""
