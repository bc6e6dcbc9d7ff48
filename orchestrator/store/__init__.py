"""What outlives the process: SQLite through SQLModel, one writer thread."""
