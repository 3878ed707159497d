"""Methods that look at a task vector as a matrix, by its singular vectors."""
