"""One module for each backend; ``registry.Backend`` says what they have in common."""
