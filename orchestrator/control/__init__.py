"""The single writer: the loop that turns events into decisions, and what surrounds it."""
