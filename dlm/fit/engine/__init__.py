"""A fitting problem goes in; its lowest minimum and the rivals of this minimum come out."""
