"""What data say about the weights, and codes that are chosen by it."""
