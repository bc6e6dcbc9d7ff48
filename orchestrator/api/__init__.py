"""HTTP: parse, call the loop, render."""
