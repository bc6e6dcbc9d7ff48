"""The command line, a user of the public HTTP API."""
