"""A small client of the public HTTP API."""
