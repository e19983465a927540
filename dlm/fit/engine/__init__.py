"""A fitting problem goes in; its lowest minima come out."""
