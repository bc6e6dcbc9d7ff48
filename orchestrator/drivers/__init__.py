"""The edge: one library per file, each behind a port of control/ports.py."""
