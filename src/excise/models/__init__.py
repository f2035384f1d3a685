"""Models: loading them from a folder, the hub or a GGUF file, and reading them as a stack of blocks."""
