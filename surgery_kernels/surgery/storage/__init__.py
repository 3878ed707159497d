"""What a fit keeps, in memory or on disk: features, tokens between blocks, and its own state."""
