"""Text, or packed files that other programs made, goes in; packed tokens with a manifest come out (no torch)."""
