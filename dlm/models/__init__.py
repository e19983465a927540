"""models: ModelShape -> TransEncoder, and the Lightning module that trains it."""
