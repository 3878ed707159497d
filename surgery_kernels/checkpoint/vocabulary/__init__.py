"""Which rows of embeddings and output layers belong to which tokens."""
