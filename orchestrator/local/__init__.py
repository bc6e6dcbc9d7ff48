"""What the embedded default runs: real llama.cpp as a host process, and the demo models."""
