"""Text, or packed files of others, goes in; packed tokens with a manifest come out (no torch)."""
