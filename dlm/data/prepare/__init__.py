"""Make packed tokens with a manifest from text, or from packed files that other programs made (without torch)."""
